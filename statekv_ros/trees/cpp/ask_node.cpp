// AskMemory for BehaviorTree.CPP v4: asks a memory node through its action ~/ask. Nav2 loads it as statekv_ask_bt_node.
//
// The tree's blackboard holds the ROS node as "node" (rclcpp::Node::SharedPtr), as that of Nav2 does up to Kilted. A tick never
// waits: what came is taken by an executor of its own, which has the action client alone.
#include <chrono>
#include <future>
#include <memory>
#include <optional>
#include <string>

#include "behaviortree_cpp/bt_factory.h"
#include "builtin_interfaces/msg/time.hpp"
#include "geometry_msgs/msg/pose_stamped.hpp"
#include "rclcpp/rclcpp.hpp"
#include "rclcpp_action/rclcpp_action.hpp"
#include "statekv_ros/action/ask.hpp"

namespace statekv_ros
{
using Ask = action::Ask;
using Client = rclcpp_action::Client<Ask>;
using Handle = rclcpp_action::ClientGoalHandle<Ask>;
using Clock = std::chrono::steady_clock;

constexpr auto kPatience = std::chrono::seconds(5);              // with a memory node that does not do what it should
constexpr auto kAcceptance = std::chrono::milliseconds(500);     // of a goal; it takes milliseconds

class AskMemory : public BT::StatefulActionNode
{
public:
  AskMemory(const std::string & name, const BT::NodeConfig & config)
  : BT::StatefulActionNode(name, config),
    node_(config.blackboard->get<rclcpp::Node::SharedPtr>("node"))
  {
    group_ = node_->create_callback_group(rclcpp::CallbackGroupType::MutuallyExclusive, false);
    executor_.add_callback_group(group_, node_->get_node_base_interface());
  }

  static BT::PortsList providedPorts()
  {
    return {
      BT::InputPort<std::string>("question", "what is asked"),
      BT::InputPort<std::string>("camera", "", "camera name; empty: every camera"),
      BT::InputPort<std::string>("memory", "statekv", "the memory node's name, with its namespace"),
      BT::InputPort<float>("timeout_s", 30.0f, "seconds that the answer may take"),
      BT::OutputPort<std::string>("text"),
      BT::OutputPort<builtin_interfaces::msg::Time>("stamp"),
      BT::OutputPort<geometry_msgs::msg::PoseStamped>("pose"),
      BT::OutputPort<uint16_t>("error_code")};
  }

  BT::NodeStatus onStart() override
  {
    const auto memory = getInput<std::string>("memory").value();
    if (!client_ || memory != memory_) {
      client_ = rclcpp_action::create_client<Ask>(node_, memory + "/ask", group_);
      memory_ = memory;
    }
    goal_ = Ask::Goal();
    if (!getInput("question", goal_.question)) {
      throw BT::RuntimeError("AskMemory: the port question is missing");
    }
    getInput("camera", goal_.camera);
    getInput("timeout_s", goal_.timeout_s);
    state_ = std::make_shared<State>();
    started_ = Clock::now();
    return onRunning();
  }

  BT::NodeStatus onRunning() override
  {
    const bool ready = client_->action_server_is_ready();
    if (!state_->sent && ready) {
      send();
    } else if (!state_->sent && since(started_) > kPatience) {
      return give_up("is not there");
    }
    executor_.spin_some();
    if (state_->rejected) {
      return give_up("has too many goals to take another", Ask::Result::QUEUE_FULL);
    }
    if (state_->result) {
      return finish(*state_->result);
    }
    return state_->sent ? wait(ready) : BT::NodeStatus::RUNNING;
  }

  void onHalted() override
  {
    if (state_->sent && !state_->handle && !state_->rejected) {
      // Nobody may tick again, and only an accepted goal can be canceled.
      executor_.spin_until_future_complete(state_->response, kAcceptance);
    }
    cancel();
  }

private:
  // What callbacks of one goal write; those of a goal that was halted write to what nobody reads.
  struct State
  {
    std::optional<Clock::time_point> sent, left;
    bool rejected{false};
    std::shared_future<Handle::SharedPtr> response;
    Handle::SharedPtr handle;
    Ask::Result::SharedPtr result;
  };

  static Clock::duration since(Clock::time_point moment) {return Clock::now() - moment;}

  void send()
  {
    auto options = Client::SendGoalOptions();
    options.goal_response_callback = [state = state_](Handle::SharedPtr handle) {
        state->handle = handle;
        state->rejected = !handle;
      };
    options.result_callback = [state = state_](const Handle::WrappedResult & wrapped) {
        state->result = wrapped.result;
      };
    state_->response = client_->async_send_goal(goal_, options);
    state_->sent = Clock::now();
  }

  // For the result of a goal that was sent, as long as one may come.
  BT::NodeStatus wait(bool ready)
  {
    if (!ready && !state_->left) {
      state_->left = Clock::now();
    }
    if (state_->left && since(*state_->left) > kPatience) {     // also when it came back: it has forgotten the goal
      return give_up("left while it was answering");
    }
    if (!state_->handle && since(*state_->sent) > kPatience) {
      return give_up("did not take the question");
    }
    // It ends an answer in time itself, unless it was started anew meanwhile.
    if (goal_.timeout_s > 0 && since(*state_->sent) > kPatience + std::chrono::duration<float>(goal_.timeout_s)) {
      return give_up("did not answer within timeout_s", Ask::Result::TIMEOUT);
    }
    return BT::NodeStatus::RUNNING;
  }

  void cancel()
  {
    if (state_->handle && !state_->result) {
      client_->async_cancel_goal(state_->handle);
      executor_.spin_some();
    }
  }

  BT::NodeStatus finish(const Ask::Result & result)
  {
    const auto & answer = result.answer;
    const auto & stamp = answer.evidence.empty() ? answer.last_stamp : answer.evidence[0].last_stamp;
    write(answer.text, stamp, answer.pose, result.error_code);
    if (!result.success) {
      RCLCPP_WARN(node_->get_logger(), "AskMemory: %s", result.error_msg.c_str());
    }
    return result.success ? BT::NodeStatus::SUCCESS : BT::NodeStatus::FAILURE;
  }

  BT::NodeStatus give_up(const char * why, uint16_t error_code = Ask::Result::UNKNOWN)
  {
    RCLCPP_WARN(node_->get_logger(), "AskMemory: memory node '%s' %s", memory_.c_str(), why);
    cancel();
    write("", builtin_interfaces::msg::Time(), geometry_msgs::msg::PoseStamped(), error_code);
    return BT::NodeStatus::FAILURE;
  }

  // All of them, always: a pose of the question before would send the robot somewhere.
  void write(
    const std::string & text, const builtin_interfaces::msg::Time & stamp, const geometry_msgs::msg::PoseStamped & pose,
    uint16_t error_code)
  {
    setOutput("text", text);
    setOutput("stamp", stamp);
    setOutput("pose", pose);
    setOutput("error_code", error_code);
  }

  rclcpp::Node::SharedPtr node_;
  rclcpp::CallbackGroup::SharedPtr group_;
  rclcpp::executors::SingleThreadedExecutor executor_;
  Client::SharedPtr client_;
  std::string memory_;
  Ask::Goal goal_;
  std::shared_ptr<State> state_;
  Clock::time_point started_;
};
}  // namespace statekv_ros

BT_REGISTER_NODES(factory)
{
  factory.registerNodeType<statekv_ros::AskMemory>("AskMemory");
}

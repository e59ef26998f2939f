// AskMemory for BehaviorTree.CPP v4: asks a memory node through its action ~/ask. Nav2 loads it as statekv_ask_bt_node.
//
// The tree's blackboard holds the ROS node as "node" (rclcpp::Node::SharedPtr), as Nav2's does. A tick never waits: what came is
// taken by an executor of its own, which has the action client alone.
#include <chrono>
#include <memory>
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
using Handle = rclcpp_action::ClientGoalHandle<Ask>;

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
      BT::InputPort<float>("timeout_s", 0.0f, "seconds; 0: the node's default"),
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
    started_ = std::chrono::steady_clock::now();
    return onRunning();
  }

  BT::NodeStatus onRunning() override
  {
    if (!state_->sent) {
      if (client_->action_server_is_ready()) {
        send();
      } else if (std::chrono::steady_clock::now() - started_ > std::chrono::seconds(5)) {
        RCLCPP_WARN(node_->get_logger(), "AskMemory: no memory node '%s'", memory_.c_str());
        return fail(Ask::Result::UNKNOWN);
      }
    }
    executor_.spin_some();
    if (state_->rejected) {
      return fail(Ask::Result::QUEUE_FULL);
    }
    if (!state_->result) {
      return BT::NodeStatus::RUNNING;
    }
    const auto & result = *state_->result;
    const auto & answer = result.answer;
    setOutput("text", answer.text);
    setOutput("stamp", answer.evidence.empty() ? answer.last_stamp : answer.evidence[0].last_stamp);
    if (answer.has_pose) {
      setOutput("pose", answer.pose);
    }
    setOutput("error_code", result.error_code);
    if (!result.success) {
      RCLCPP_WARN(node_->get_logger(), "AskMemory: %s", result.error_msg.c_str());
    }
    return result.success ? BT::NodeStatus::SUCCESS : BT::NodeStatus::FAILURE;
  }

  void onHalted() override
  {
    // A goal that is not accepted yet is canceled as soon as it is.
    state_->halted = true;
    if (state_->handle && !state_->result) {
      client_->async_cancel_goal(state_->handle);
      executor_.spin_some();
    }
  }

private:
  // What callbacks of one goal write; those of a goal that was halted write to what nobody reads.
  struct State
  {
    bool sent{false}, rejected{false}, halted{false};
    Handle::SharedPtr handle;
    Ask::Result::SharedPtr result;
  };

  void send()
  {
    auto options = rclcpp_action::Client<Ask>::SendGoalOptions();
    options.goal_response_callback = [state = state_, client = client_](Handle::SharedPtr handle) {
        state->handle = handle;
        state->rejected = !handle;
        if (handle && state->halted) {
          client->async_cancel_goal(handle);
        }
      };
    options.result_callback = [state = state_](const Handle::WrappedResult & wrapped) {
        state->result = wrapped.result;
      };
    client_->async_send_goal(goal_, options);
    state_->sent = true;
  }

  BT::NodeStatus fail(uint16_t error_code)
  {
    setOutput("text", std::string());
    setOutput("error_code", error_code);
    return BT::NodeStatus::FAILURE;
  }

  rclcpp::Node::SharedPtr node_;
  rclcpp::CallbackGroup::SharedPtr group_;
  rclcpp::executors::SingleThreadedExecutor executor_;
  rclcpp_action::Client<Ask>::SharedPtr client_;
  std::string memory_;
  Ask::Goal goal_;
  std::shared_ptr<State> state_;
  std::chrono::steady_clock::time_point started_;
};
}  // namespace statekv_ros

BT_REGISTER_NODES(factory)
{
  factory.registerNodeType<statekv_ros::AskMemory>("AskMemory");
}

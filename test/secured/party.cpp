// One participant of a domain with the topics that it is told of, secured by an enclave of a keystore or not at all: which of them
// it may open, and whom they find. A run by hand: see docs/security.md.
//   party ENCLAVE_FOLDER|- DOMAIN SECONDS (pub|sub):DDS_TOPIC ...
#include <chrono>
#include <cstdlib>
#include <iostream>
#include <map>
#include <string>
#include <thread>
#include <vector>

#include <fastdds/dds/log/Log.hpp>
#include <fastdds/dds/domain/DomainParticipant.hpp>
#include <fastdds/dds/domain/DomainParticipantFactory.hpp>
#include <fastdds/dds/publisher/DataWriter.hpp>
#include <fastdds/dds/publisher/Publisher.hpp>
#include <fastdds/dds/subscriber/DataReader.hpp>
#include <fastdds/dds/subscriber/Subscriber.hpp>
#include <fastdds/dds/topic/TopicDataType.hpp>
#include <fastdds/dds/topic/TypeSupport.hpp>

using namespace eprosima::fastdds::dds;

// Eight bytes: only who may say and hear them is on trial.
class Octets : public TopicDataType
{
public:
  Octets() { setName("octets"); m_typeSize = 12; m_isGetKeyDefined = false; }
  bool serialize(void*, eprosima::fastrtps::rtps::SerializedPayload_t* payload) override
  {
    payload->length = 12;
    return true;
  }
  bool deserialize(eprosima::fastrtps::rtps::SerializedPayload_t*, void*) override { return true; }
  std::function<uint32_t()> getSerializedSizeProvider(void*) override { return [] { return 12u; }; }
  void* createData() override { return new char[8]; }
  void deleteData(void* data) override { delete[] static_cast<char*>(data); }
  bool getKey(void*, eprosima::fastrtps::rtps::InstanceHandle_t*, bool) override { return false; }
};

static DomainParticipantQos qos_of(const std::string& enclave)
{
  DomainParticipantQos qos;
  if (enclave == "-") {
    return qos;
  }
  auto& properties = qos.properties().properties();
  const auto set = [&](const std::string& name, const std::string& value) { properties.emplace_back("dds.sec." + name, value); };
  const std::string here = "file://" + enclave + "/";
  set("auth.plugin", "builtin.PKI-DH");
  set("auth.builtin.PKI-DH.identity_ca", here + "identity_ca.cert.pem");
  set("auth.builtin.PKI-DH.identity_certificate", here + "cert.pem");
  set("auth.builtin.PKI-DH.private_key", here + "key.pem");
  set("crypto.plugin", "builtin.AES-GCM-GMAC");
  set("access.plugin", "builtin.Access-Permissions");
  set("access.builtin.Access-Permissions.permissions_ca", here + "permissions_ca.cert.pem");
  set("access.builtin.Access-Permissions.governance", here + "governance.p7s");
  set("access.builtin.Access-Permissions.permissions", here + "permissions.p7s");
  return qos;
}

int main(int count, char** values)
{
  Log::ClearConsumers();    // what is refused is told below
  const std::vector<std::string> arguments(values + 1, values + count);
  auto* participant = DomainParticipantFactory::get_instance()->create_participant(std::stoi(arguments.at(1)), qos_of(arguments.at(0)));
  if (participant == nullptr) {
    std::cout << "no participant" << std::endl;
    return 1;
  }
  TypeSupport type(new Octets());
  type.register_type(participant);
  auto* publisher = participant->create_publisher(PUBLISHER_QOS_DEFAULT);
  auto* subscriber = participant->create_subscriber(SUBSCRIBER_QOS_DEFAULT);
  std::map<std::string, Topic*> topics;
  std::vector<DataWriter*> writers;
  std::vector<DataReader*> readers;
  for (size_t i = 3; i < arguments.size(); ++i) {
    const bool publishes = arguments[i].rfind("pub:", 0) == 0;
    auto*& topic = topics[arguments[i].substr(4)];
    if (topic == nullptr) {
      topic = participant->create_topic(arguments[i].substr(4), "octets", TOPIC_QOS_DEFAULT);
    }
    auto reliable = DATAREADER_QOS_DEFAULT;
    reliable.reliability().kind = RELIABLE_RELIABILITY_QOS;
    writers.push_back(publishes ? publisher->create_datawriter(topic, DATAWRITER_QOS_DEFAULT) : nullptr);
    readers.push_back(publishes ? nullptr : subscriber->create_datareader(topic, reliable));
  }
  std::this_thread::sleep_for(std::chrono::duration<double>(std::stod(arguments.at(2))));
  for (size_t i = 0; i < writers.size(); ++i) {
    std::cout << arguments[i + 3] << ": ";
    if (writers[i] != nullptr) {
      PublicationMatchedStatus status;
      writers[i]->get_publication_matched_status(status);
      std::cout << status.current_count << " found";
    } else if (readers[i] != nullptr) {
      SubscriptionMatchedStatus status;
      readers[i]->get_subscription_matched_status(status);
      std::cout << status.current_count << " found";
    } else {
      std::cout << "refused";
    }
    std::cout << std::endl;
  }
  std::_Exit(0);
}

// Asks about an image and prints the answer as it comes.
//
// Usage: stream HOST:PORT IMAGE QUESTION

#include <grpcpp/grpcpp.h>

#include <chrono>
#include <fstream>
#include <iostream>
#include <iterator>
#include <memory>
#include <string>

#include "trimserve/v1/generation.grpc.pb.h"

namespace {

using trimserve::v1::GenerateRequest;
using trimserve::v1::GenerateStreamResponse;
using trimserve::v1::GenerationService;

/// Shows the image, then asks.
GenerateRequest make_request(const std::string& image, const std::string& question) {
  std::ifstream file(image, std::ios::binary);
  GenerateRequest request;
  auto* message = request.mutable_chat()->add_messages();
  message->set_role(trimserve::v1::ROLE_USER);
  message->add_parts()->mutable_image()->set_data(std::string(std::istreambuf_iterator<char>(file), {}));
  message->add_parts()->set_text(question);
  return request;
}

/// Prints the answer, and what it kept of the image.
grpc::Status ask(const std::string& address, const GenerateRequest& request) {
  const auto stub = GenerationService::NewStub(grpc::CreateChannel(address, grpc::InsecureChannelCredentials()));
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::minutes(1));
  const auto stream = stub->GenerateStream(&context, request);
  for (GenerateStreamResponse event; stream->Read(&event);) {
    std::cout << event.delta().text() << std::flush;
    if (event.has_finished()) {
      const auto& usage = event.finished().usage().images(0);
      std::cout << "\nkept " << usage.kept_features() << " of " << usage.valid_features() << " visual features, "
                << usage.merged_features() << " merged rows\n";
    }
  }
  return stream->Finish();
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) {
    std::cerr << "usage: stream HOST:PORT IMAGE QUESTION\n";
    return 2;
  }
  const grpc::Status status = ask(argv[1], make_request(argv[2], argv[3]));
  if (!status.ok()) {
    std::cerr << "status " << status.error_code() << ": " << status.error_message() << "\n";
    return 1;
  }
}

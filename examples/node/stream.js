// Asks about an image and prints the answer as it comes; the protos are read at run time.
//
// Usage: node stream.js HOST:PORT IMAGE QUESTION
// TLS with TRIMSERVE_CA, a file; a certificate of one's own with TRIMSERVE_CERT and TRIMSERVE_KEY; TRIMSERVE_TOKEN.

import { readFileSync } from "node:fs";
import { fileURLToPath } from "node:url";
import grpc from "@grpc/grpc-js";
import protoLoader from "@grpc/proto-loader";

const protos = fileURLToPath(new URL("../../protos", import.meta.url));
const options = { includeDirs: [protos], keepCase: true, longs: Number, defaults: true };
const definition = protoLoader.loadSync("trimserve/v1/generation.proto", options);
const { trimserve } = grpc.loadPackageDefinition(definition);

const [address, image, question] = process.argv.slice(2);
if (question === undefined) {
  console.error("usage: node stream.js HOST:PORT IMAGE QUESTION");
  process.exit(2);
}

const { TRIMSERVE_CA: ca, TRIMSERVE_CERT: cert, TRIMSERVE_KEY: key, TRIMSERVE_TOKEN: token } = process.env;
const read = (path) => (path ? readFileSync(path) : null);
const tls = ca && grpc.credentials.createSsl(read(ca), read(key), read(cert));
const client = new trimserve.v1.GenerationService(address, tls || grpc.credentials.createInsecure());
const metadata = new grpc.Metadata();
if (token) metadata.set("authorization", `Bearer ${token}`);

const parts = [{ image: { data: readFileSync(image) } }, { text: question }];
const request = { chat: { messages: [{ role: "ROLE_USER", parts }] } };
const call = client.GenerateStream(request, metadata, { deadline: Date.now() + 60_000 });

call.on("data", ({ delta, finished }) => {
  if (delta) process.stdout.write(delta.text);
  if (finished) {
    const { kept_features: kept, valid_features: valid, merged_features: merged } = finished.usage.images[0];
    console.log(`\nkept ${kept} of ${valid} visual features, ${merged} merged rows`);
  }
});
call.on("error", ({ code, details }) => {
  console.error(`${grpc.status[code]}: ${details}`);
  process.exitCode = 1;
});
call.on("close", () => client.close());

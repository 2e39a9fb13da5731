// SPDX-License-Identifier: Apache-2.0
// kmonitor.v1.MonitorService from its .proto files, loaded at run time: nothing here is generated.
//
// KMONITOR_PROTO is the folder of the .proto files, KMONITOR_NODE_MODULES the one that npm installed into.
import { createRequire } from "node:module";

const require = createRequire(`${process.env.KMONITOR_NODE_MODULES}/`);
const grpc = require("@grpc/grpc-js");
const protoLoader = require("@grpc/proto-loader");

export function connect(address) {
  const definition = protoLoader.loadSync("kmonitor/v1/monitor.proto", {
    includeDirs: [process.env.KMONITOR_PROTO],
    keepCase: true,
    longs: String,
    enums: String,
    oneofs: true,
  });
  const { MonitorService } = grpc.loadPackageDefinition(definition).kmonitor.v1;
  return new MonitorService(address, grpc.credentials.createInsecure());
}

// One JSON line for each notification, and a last one for the stream's status.
export function print(call, client) {
  call.on("data", (notification) => console.log(JSON.stringify(notification)));
  call.on("error", () => {}); // told by "status", which comes in any case
  call.on("status", ({ code, details }) => {
    console.log(JSON.stringify({ kind: "status", status: grpc.status[code], details }));
    client.close();
    process.stdin.destroy();
  });
}

// SPDX-License-Identifier: Apache-2.0
// watch.mjs HOST:PORT     each line of standard input is a WatchRequest as JSON; its end cancels the call
import { createInterface } from "node:readline";
import { connect, print } from "./service.mjs";

const client = connect(process.argv[2]);
const call = client.Watch();
print(call, client);
const lines = createInterface({ input: process.stdin });
lines.on("line", (line) => call.write(JSON.parse(line)));
lines.on("close", () => call.cancel());
process.on("SIGTERM", () => call.cancel());

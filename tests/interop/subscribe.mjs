// SPDX-License-Identifier: Apache-2.0
// subscribe.mjs HOST:PORT REGISTRATIONS     REGISTRATIONS is a JSON array; the end of standard input cancels the call
import { connect, print } from "./service.mjs";

const [address, registrations] = process.argv.slice(2);
const client = connect(address);
const call = client.Subscribe({ registrations: JSON.parse(registrations) });
print(call, client);
process.stdin.on("end", () => call.cancel());
process.on("SIGTERM", () => call.cancel());
process.stdin.resume();

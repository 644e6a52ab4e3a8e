// Calls Greeter/Hello with grpc-js over xDS. tests/clients/README.md says what it does.
"use strict";

const { parseArgs } = require("node:util");
const grpc = require("@grpc/grpc-js");
require("@grpc/grpc-js-xds").register();

const { values: args } = parseArgs({
  options: {
    target: { type: "string" },
    concurrency: { type: "string", default: "8" },
    rate: { type: "string", default: "500" },
  },
});
const concurrency = Number(args.concurrency);
const pause = (1000 * concurrency) / Number(args.rate);
const by = {};
const errors = {};
let stopped = false;

const encode = (name) => Buffer.concat([Buffer.from([0x0a, name.length]), Buffer.from(name)]);

// The string fields of a message by number; every one of them is shorter than 128 bytes.
function decode(message) {
  const fields = {};
  for (let at = 0; at < message.length; at += 2 + message[at + 1]) {
    fields[message[at] >> 3] = message.toString("utf8", at + 2, at + 2 + message[at + 1]);
  }
  return fields;
}

const total = (counts) => Object.values(counts).reduce((sum, count) => sum + count, 0);
const report = () =>
  process.stdout.write(JSON.stringify({ ok: total(by), failed: total(errors), by, errors }) + "\n");

const client = new grpc.Client(args.target, grpc.credentials.createInsecure());
const hello = () =>
  new Promise((resolve) => {
    const options = { deadline: Date.now() + 5000 };
    const metadata = new grpc.Metadata({ waitForReady: true });
    client.makeUnaryRequest("/greeter.v1.Greeter/Hello", encode, decode, "node", metadata, options, (error, reply) => {
      const [counts, key] = error ? [errors, `${grpc.status[error.code]}: ${error.details}`] : [by, reply[2]];
      counts[key] = (counts[key] ?? 0) + 1;
      resolve();
    });
  });

async function callUntilStopped(first) {
  let due = performance.now() + (pause * first) / concurrency;
  for (;;) {
    await new Promise((resolve) => setTimeout(resolve, Math.max(0, due - performance.now())));
    if (stopped) return;
    due = Math.max(due + pause, performance.now());
    await hello();
  }
}

const callers = Array.from({ length: concurrency }, (_, first) => callUntilStopped(first));
const reports = setInterval(report, 100);
process.stdin.resume().on("end", async () => {
  stopped = true;
  await Promise.all(callers);
  clearInterval(reports);
  report();
  client.close();
  process.exit(0);
});

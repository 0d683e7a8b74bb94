// Prints the events of a job until it is closed: node watch.js JOB
// MILEPOST_SERVER is the server, MILEPOST_API_KEY the secret of a credential.

import { createConnectTransport } from "@connectrpc/connect-node";
import { EventKind, MilepostError, watch, withCredential } from "@milepost/client";

const [jobId = ""] = process.argv.slice(2);
const transport = createConnectTransport({
  baseUrl: process.env["MILEPOST_SERVER"] ?? "http://127.0.0.1:50051",
  httpVersion: "2",
  pingIntervalMs: 20_000,
  interceptors: [withCredential(process.env["MILEPOST_API_KEY"] ?? "")],
});

const events = watch(transport, {
  jobId,
  onCaughtUp: () => console.log("-- all events so far; new ones follow"),
  onInterruption: (error, pauseMs) => console.error(`${error.message}; again in ${pauseMs} ms`),
});
try {
  for await (const { sequence, kind, name, stepName, progress } of events) {
    console.log(`${sequence} ${EventKind[kind]} ${name || stepName} (${progress?.percent} %)`);
  }
  console.log(`the job is closed with ${events.end?.lastSequence} events`);
} catch (error) {
  if (!(error instanceof MilepostError)) throw error;
  console.error(error.message, ...error.fieldViolations.map(({ field, description }) => `${field}: ${description}`));
  process.exitCode = 1;
}

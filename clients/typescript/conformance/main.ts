// The scenario that the clients of all languages run. Prints one JSON object a line.

import { createConnectTransport, createGrpcTransport } from "@connectrpc/connect-node";
import { EventKind, type JobRef, type MilepostError, Publisher, watch, withCredential } from "@milepost/client";

function setting(name: string): string {
  const value = process.env[name];
  if (value === undefined) throw new Error(`${name} is not set`);
  return value;
}

const print = (line: object) =>
  process.stdout.write(`${JSON.stringify(line, (_, value) => (typeof value === "bigint" ? Number(value) : value))}\n`);

const jobs = setting("MILEPOST_JOBS").split(",");
const rounds = Number(setting("MILEPOST_ROUNDS"));
const pauseMs = Number(setting("MILEPOST_PAUSE_MS"));

function connect() {
  const baseUrl = setting("MILEPOST_SERVER");
  const interceptors = [withCredential(setting("MILEPOST_API_KEY"))];
  const pings = { pingIntervalMs: 5_000, pingTimeoutMs: 5_000 };
  switch (process.env["MILEPOST_TRANSPORT"]) {
    case "http1":
      return createConnectTransport({ baseUrl, httpVersion: "1.1", interceptors });
    case "grpc":
      return createGrpcTransport({ baseUrl, interceptors, ...pings });
    default:
      return createConnectTransport({ baseUrl, httpVersion: "2", interceptors, ...pings });
  }
}

const transport = connect();

/** The id of a job that the program has named by its id. */
const idOf = (job: JobRef) => ("jobId" in job ? job.jobId : job.providerJobId);

async function follow(name: string, scope: { jobId: string } | { allJobs: object }): Promise<void> {
  const events = watch(transport, {
    ...scope,
    heartbeatIntervalMs: 5_000,
    onCaughtUp: () => void print({ kind: "caught_up", watch: name }),
    onHeartbeat: () => void print({ kind: "heartbeat", watch: name }),
    onInterruption: ({ message }) => void print({ kind: "interruption", watch: name, error: message }),
  });
  const complete = new Set<string>();
  for await (const event of events) {
    print({ kind: "event", watch: name, job: event.jobId, sequence: event.sequence, id: event.id, name: event.name });
    if (event.kind === EventKind.COMPLETE) complete.add(event.jobId);
    if (name === "all" && jobs.every((job) => complete.has(job))) return;
  }
  print({ kind: "end", watch: name, last_sequence: events.end?.lastSequence });
}

async function publish(): Promise<void> {
  await using publisher = new Publisher(transport, {
    onStored: (job, { sequence, id }) => void print({ kind: "stored", job: idOf(job), sequence, id }),
    onRefused: (job, { id }, { reason }) => void print({ kind: "refused", job: idOf(job), id, reason }),
    onInterruption: ({ message }: MilepostError) =>
      void print({ kind: "interruption", watch: "publisher", error: message }),
    onCancellationRequested: (job) => void print({ kind: "cancellation_requested", job: idOf(job) }),
  });
  const append = async (kind: EventKind, name: string) => {
    for (const jobId of jobs) await publisher.append({ jobId }, { kind, name });
  };
  for (let round = 1; round <= rounds; round++) {
    await append(EventKind.INFO, `${round}`);
    if (round % 10 === 0) await append(EventKind.INFO, "x".repeat(300));
    await new Promise((resolve) => setTimeout(resolve, pauseMs));
  }
  await append(EventKind.COMPLETE, "complete");
  await publisher.flush();
  print({ kind: "flushed" });
}

try {
  await Promise.all([publish(), follow("all", { allJobs: {} }), ...jobs.map((jobId) => follow(jobId, { jobId }))]);
} catch (error) {
  console.error(error);
  process.exit(1);
}

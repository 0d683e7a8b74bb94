import assert from "node:assert/strict";
import { getEventListeners } from "node:events";
import { Code } from "@connectrpc/connect";
import { createGrpcTransport } from "@connectrpc/connect-node";
import {
  type Event,
  EventKind,
  JobStatus,
  MilepostError,
  StepStatus,
  type Watch,
  watch,
  withCredential,
} from "@milepost/client";
import { connectTo, STEP, sleep, until } from "./server.js";
import { server, startProxy, test, world } from "./world.js";

const names = (events: readonly Event[]) => events.map(({ name }) => name);
const numbers = (events: readonly Event[]) => events.map(({ sequence }) => Number(sequence));

/** What a watch throws instead of its next event. */
async function failure(events: Watch): Promise<MilepostError> {
  const thrown = await events.next().catch((error: unknown) => error);
  assert.ok(thrown instanceof MilepostError, String(thrown));
  return thrown;
}

/** Reads a watch to its end, into an array that grows. */
function collect(events: Watch): { all: Event[]; ended: Promise<void> } {
  const all: Event[] = [];
  const read = async () => {
    for await (const event of events) all.push(event);
  };
  return { all, ended: read() };
}

const TRANSPORTS = {
  "Connect by HTTP/1.1": () => connectTo(server.origin, world.secret, "1.1"),
  "Connect by HTTP/2": () => connectTo(server.origin, world.secret),
  gRPC: () => createGrpcTransport({ baseUrl: server.origin, interceptors: [withCredential(world.secret)] }),
};

for (const [name, transport] of Object.entries(TRANSPORTS)) {
  test(`a watch has the past, then new events, and ends when the job is closed, over ${name}`, async () => {
    const job = await world.createJob();
    await world.append(job, "a");
    await world.progress(job, "b", 40);
    const seen: unknown[] = [];
    const events = watch(transport(), {
      ...job,
      kinds: [EventKind.INFO, EventKind.PROGRESS, EventKind.COMPLETE],
      onCaughtUp: async ({ job: state, steps }) => {
        await world.append(job, "c");
        await world.complete(job);
        seen.push(state?.lastSequence, ...steps.map(({ stepTag, status, percent }) => [stepTag, status, percent]));
      },
    });
    for await (const { name, stepPercent, progress } of events) {
      seen.push(name);
      if (stepPercent !== undefined) seen.push([stepPercent, progress?.percent]);
    }
    assert.deepEqual(seen, ["a", "b", [40, 40], 2n, [STEP, StepStatus.UNDER_WAY, 40], "c", "complete"]);
    assert.deepEqual([events.end?.lastSequence, events.end?.status], [4n, JobStatus.COMPLETE]);
    assert.deepEqual(await events.next(), { done: true, value: undefined });
  });
}

test("a watch misses no event and repeats none when connections break and servers end", async (t) => {
  const proxy = await startProxy(t);
  const job = await world.createJob();
  const interruptions: MilepostError[] = [];
  let open = 0;
  const callbacks = {
    onCaughtUp: () => void open++,
    onInterruption: (error: MilepostError) => void interruptions.push(error),
  };
  const ofJob: ReturnType<typeof collect>[] = [];
  const ofAll: { events: Watch; all: Event[]; ended: Promise<void> }[] = [];
  for (const version of ["1.1", "2"] as const) {
    const transport = connectTo(proxy.origin, world.secret, version);
    ofJob.push(collect(watch(transport, { ...job, ...callbacks })));
    const events = watch(transport, { allJobs: { configurationTag: "ct" }, start: "now", ...callbacks });
    ofAll.push({ events, ...collect(events) });
  }
  await until(() => open === 4);
  const faults = [
    () => proxy.cut(),
    async () => {
      await server.end("SIGKILL");
      await server.start();
    },
    async () => {
      await server.end("SIGTERM");
      await server.start();
    },
  ];
  const expected: string[] = [];
  for (const [i, fault] of faults.entries()) {
    expected.push(`before ${i}`, `after ${i}`);
    await world.append(job, `before ${i}`);
    for (const { all } of [...ofJob, ...ofAll]) await until(() => all.length > 2 * i);
    await fault();
    await world.append(job, `after ${i}`);
    for (const { all } of [...ofJob, ...ofAll]) await until(() => all.length > 2 * i + 1);
  }
  await world.complete(job);
  for (const { all, ended } of ofJob) {
    await ended;
    assert.deepEqual(all, await world.list(job));
  }
  for (const { all, events, ended } of ofAll) {
    await until(() => all.length > expected.length);
    await Promise.all([events.return(), ended]);
    assert.deepEqual(names(all), [...expected, "complete"]);
  }
  assert.ok(interruptions.length >= 4 * faults.length, `${interruptions.length} interruptions`);
  assert.ok(interruptions.some(({ reason }) => reason === "DRAINING"));
});

test("a watch notices a connection that is silent, and not a reader that takes its time", async (t) => {
  const proxy = await startProxy(t);
  const [job, slowly] = [await world.createJob(), await world.createJob()];
  await world.append(job, "a");
  await world.append(slowly, "a");
  const interruptions: MilepostError[] = [];
  const read = async () => {
    const events = watch(connectTo(proxy.origin, world.secret, "1.1"), {
      ...job,
      heartbeatIntervalMs: 5_000,
      onCaughtUp: () => proxy.stall(interruptions.length === 0),
      onInterruption: async (error) => {
        interruptions.push(error);
        proxy.stall(false);
        if (interruptions.length === 1) await world.complete(job);
      },
    });
    for await (const _ of events);
    assert.equal(events.end?.lastSequence, 2n);
  };
  const readSlowly = async () => {
    const events = watch(connectTo(server.origin, world.secret, "1.1"), {
      ...slowly,
      heartbeatIntervalMs: 5_000,
      onInterruption: assert.fail,
    });
    for await (const { sequence } of events) {
      if (sequence > 1n) continue;
      await sleep(16_000);
      await world.complete(slowly);
    }
    assert.equal(events.end?.lastSequence, 2n);
  };
  await Promise.all([read(), readSlowly()]);
  assert.match(interruptions[0]?.message ?? "", /no message came for 15 s/);
});

test("leaving a watch ends its call at once", async (t) => {
  const proxy = await startProxy(t);
  const job = await world.createJob();
  await world.append(job, "a", "b");
  const transport = connectTo(proxy.origin, world.secret, "1.1");
  const options = { ...job, onInterruption: assert.fail };

  for await (const event of watch(transport, options)) if (event.name === "b") break;
  await until(() => proxy.connections === 0);

  const left = watch(transport, { ...options, start: { afterSequence: 2n } });
  const next = left.next();
  await until(() => proxy.connections === 1);
  await left.return();
  assert.deepEqual(await next, { done: true, value: undefined });
  await until(() => proxy.connections === 0);

  const control = new AbortController();
  const { all, ended } = collect(watch(transport, { ...options, signal: control.signal }));
  await until(() => all.length === 2);
  control.abort(new Error("enough"));
  await assert.rejects(ended, /enough/);
  await until(() => proxy.connections === 0);
  await assert.rejects(watch(transport, { ...options, signal: control.signal }).next(), /enough/);
  assert.deepEqual(getEventListeners(control.signal, "abort"), []);
});

test("the resume token stands after the last message whose events are processed", async () => {
  const job = await world.createJob();
  await world.append(job, "a", "b");
  const transport = connectTo(server.origin, world.secret);
  const first = watch(transport, job);
  for await (const event of first) if (event.name === "b") break;
  assert.equal(first.resumeToken, undefined);

  const second = watch(transport, job);
  assert.deepEqual(names([(await second.next()).value, (await second.next()).value] as Event[]), ["a", "b"]);
  const third = second.next();
  await until(() => second.resumeToken !== undefined);
  await Promise.all([second.return(), third]);
  await world.append(job, "c");
  const resumed = watch(transport, { ...job, start: { resumeToken: second.resumeToken ?? "" } });
  assert.equal(resumed.resumeToken, second.resumeToken);
  for await (const event of resumed) {
    assert.deepEqual(numbers([event]), [3]);
    break;
  }
});

test("an error that no retry cures ends a watch and is explained", async () => {
  const transport = connectTo(server.origin, world.secret);
  const onInterruption = assert.fail;
  const wrongKey = await failure(watch(connectTo(server.origin, "mpk_wrong"), { jobId: "x", onInterruption }));
  assert.deepEqual([wrongKey.code, wrongKey.reason], [Code.Unauthenticated, "CREDENTIAL_INVALID"]);

  const unknown = await failure(watch(transport, { jobId: crypto.randomUUID(), onInterruption }));
  assert.deepEqual([unknown.code, unknown.reason], [Code.NotFound, "RESOURCE_NOT_FOUND"]);
  assert.ok(unknown.details.some((each) => each.$typeName === "google.rpc.ResourceInfo" && each.resourceType));

  const job = await world.createJob();
  const negative = await failure(watch(transport, { ...job, heartbeatIntervalMs: -1, onInterruption }));
  assert.deepEqual([negative.code, negative.reason], [Code.InvalidArgument, "FIELD_INVALID"]);
  assert.match(negative.fieldViolations[0]?.field ?? "", /heartbeat_interval/);

  assert.throws(() => watch(transport, { ...job, start: { afterSequence: 2n ** 64n } }), /int64/);
  assert.throws(() => withCredential("mpk_a\n"), TypeError);
});

test("a watch ends when its credential does", async () => {
  const job = await world.createJob();
  const { id, secret } = await world.createKey();
  let caughtUp = false;
  const events = watch(connectTo(server.origin, secret), { ...job, onCaughtUp: () => void (caughtUp = true) });
  const thrown = failure(events);
  await until(() => caughtUp);
  await world.auth.expireApiKey({ apiKeyId: id });
  assert.deepEqual([(await thrown).code, (await thrown).reason], [Code.Unauthenticated, "CREDENTIAL_INVALID"]);
});

test("an error tells how long to wait", async () => {
  const logIn = () => world.auth.logIn({ email: "nobody@example.com", password: "wrong horse" });
  const errors: MilepostError[] = [];
  for (let i = 0; i < 6; i++) await logIn().catch((error: unknown) => errors.push(MilepostError.from(error)));
  const last = errors.at(-1);
  assert.deepEqual([last?.code, last?.reason], [Code.ResourceExhausted, "LOG_IN_THROTTLED"]);
  assert.ok(last?.retryDelayMs && last.retryDelayMs > 0);
  assert.ok(last.details.some((each) => each.$typeName === "google.rpc.QuotaFailure" && each.violations.length === 1));
});

import assert from "node:assert/strict";
import { getEventListeners } from "node:events";
import { Code, type Interceptor } from "@connectrpc/connect";
import { createConnectTransport } from "@connectrpc/connect-node";
import {
  type AppendEventsRequest,
  type Event,
  EventKind,
  type JobRef,
  MilepostError,
  Publisher,
  withCredential,
} from "@milepost/client";
import { connectTo, sleep, until } from "./server.js";
import { server, startProxy, test, world } from "./world.js";

const info = (name: string) => ({ kind: EventKind.INFO, name });
const names = (events: readonly Event[]) => events.map(({ name }) => name);

/** A transport, the events of each request that it sends, and how many requests were in flight at each. */
function counted() {
  const requests: string[][] = [];
  const inFlight: number[] = [];
  let count = 0;
  const interceptor: Interceptor = (next) => async (request) => {
    requests.push((request.message as AppendEventsRequest).events.map(({ name }) => name));
    inFlight.push(++count);
    return next(request).finally(() => count--);
  };
  const interceptors = [withCredential(world.secret), interceptor];
  const transport = createConnectTransport({ baseUrl: server.origin, httpVersion: "1.1", interceptors });
  return { transport, requests, inFlight };
}

test("a publisher stores events once and in order while connections break and servers end", async (t) => {
  const proxy = await startProxy(t);
  const jobs = await Promise.all(Array.from({ length: 5 }, () => world.createJob()));
  const stored = new Map<JobRef, bigint[]>(jobs.map((job) => [job, []]));
  const interruptions: MilepostError[] = [];
  const publisher = new Publisher(connectTo(proxy.origin, world.secret), {
    onStored: (job, { sequence }) => void stored.get(job)?.push(sequence),
    onInterruption: (error) => void interruptions.push(error),
  });
  const expected = Array.from({ length: 200 }, (_, i) => `${i}`);
  const publish = async () => {
    for (const name of expected) {
      for (const job of jobs) await publisher.append(job, info(name));
      await sleep(1);
    }
  };
  const breakThings = async () => {
    for (const signal of ["SIGKILL", "SIGTERM"] as const) {
      proxy.cut();
      await server.end(signal);
      await server.start();
    }
  };
  await Promise.all([publish(), breakThings()]);
  await publisher.close();
  for (const job of jobs) {
    const events = await world.list(job);
    assert.deepEqual(names(events), expected);
    assert.deepEqual(
      stored.get(job),
      events.map(({ sequence }) => sequence),
    );
    for (const { id } of events)
      assert.match(id, /^[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$/);
  }
  assert.ok(interruptions.length > 0);
});

test("of a batch only the event at fault is refused", async () => {
  const job = await world.createJob();
  const { transport, requests } = counted();
  const refused: [JobRef, string, MilepostError][] = [];
  const publisher = new Publisher(transport, {
    onRefused: (of, { name }, error) => void refused.push([of, name, error]),
    onInterruption: assert.fail,
  });
  const bad = "x".repeat(300);
  await Promise.all(["a", "b", bad, "c"].map((name) => publisher.append(job, info(name))));
  await publisher.flush();
  assert.deepEqual(requests, [["a"], ["b", bad, "c"], ["b"], [bad], ["c"]]);
  assert.deepEqual(names(await world.list(job)), ["a", "b", "c"]);
  const [[of, name, error] = []] = refused;
  assert.deepEqual(
    [refused.length, of, name, error?.code, error?.reason],
    [1, job, bad, Code.InvalidArgument, "FIELD_INVALID"],
  );
  assert.match(error?.fieldViolations[0]?.field ?? "", /name/);
  await publisher.close();
});

test("a requested cancellation is told once for each name of a job, and again by another publisher", async () => {
  const providerJobId = crypto.randomUUID();
  const job = await world.createJob(providerJobId);
  const other = await world.createJob();
  const told: [JobRef, Date][] = [];
  const onCancellationRequested = (of: JobRef, at: Date) => void told.push([of, at]);
  const transport = connectTo(server.origin, world.secret);
  const publisher = new Publisher(transport, { onCancellationRequested });
  const appendToAll = async (name: string) => {
    for (const each of [job, { providerJobId }, other]) {
      await publisher.append(each, info(name));
      await publisher.flush();
    }
  };
  await appendToAll("before");
  assert.deepEqual(told, []);
  const at = await world.requestCancellation(job);
  const expected: [JobRef, Date][] = [
    [job, at],
    [{ providerJobId }, at],
  ];
  for (const name of ["after", "later"]) {
    await appendToAll(name);
    assert.deepEqual(told, expected);
  }
  await publisher.close();

  const restarted = new Publisher(transport, { onCancellationRequested });
  await restarted.append(job, info("restarted"));
  await restarted.close();
  assert.deepEqual(told, [...expected, [job, at]]);
});

test("a told job is known until so many others were added", async () => {
  // The package does not export it.
  const module = await import(new URL("../../dist/job.js", import.meta.url).href);
  const { RecentJobs } = module as { RecentJobs: new (count: number) => { add(job: JobRef): boolean } };
  for (let before = 0; before < 3; before++) {
    const jobs = new RecentJobs(3);
    const add = (jobId: string) => jobs.add({ jobId });
    for (let i = 0; i < before; i++) assert.ok(add(`before ${i}`));
    assert.deepEqual(["a", "b", "c", "a", "b", "c", "a"].map(add), [true, true, true, false, false, false, false]);
    assert.ok(jobs.add({ providerJobId: "a" }));
    for (let i = 0; i < 6; i++) assert.ok(add(`after ${i}`));
    assert.ok(add("a"));
  }
});

test("without a callback, flush and close throw the first refusal once", async () => {
  const job = await world.createJob();
  const publisher = new Publisher(connectTo(server.origin, world.secret));
  const refusal = { name: "MilepostError", reason: "FIELD_INVALID" };
  await publisher.append(job, info("x".repeat(300)));
  await publisher.append(job, info("a"));
  await assert.rejects(publisher.flush(), refusal);
  await publisher.flush();
  await publisher.append(job, info("x".repeat(300)));
  await assert.rejects(publisher.close(), refusal);
  assert.deepEqual(names(await world.list(job)), ["a"]);
});

test("append waits while the publisher holds its maximum, and a stalled request is sent again", async (t) => {
  const proxy = await startProxy(t);
  const job = await world.createJob();
  const transport = connectTo(proxy.origin, world.secret, "1.1");
  const large = { ...info("large"), metadata: { text: "x".repeat(1000) } };
  proxy.stall(true);
  const interruptions: MilepostError[] = [];
  const onInterruption = (error: MilepostError) => void interruptions.push(error);
  const few = new Publisher(transport, { maxEvents: 2, attemptTimeoutMs: 1_000, onInterruption });
  const small = new Publisher(transport, { maxBytes: 2_500 });
  await few.append(job, info("1"));
  await few.append(job, info("2"));
  await small.append(job, large);
  await small.append(job, large);
  const appends = [few.append(job, info("3")), small.append(job, large)];
  for (const append of appends) assert.equal(await Promise.race([append, sleep(50).then(() => "waits")]), "waits");
  await until(() => interruptions.length > 0);
  assert.equal(interruptions[0]?.code, Code.DeadlineExceeded);
  proxy.stall(false);
  await Promise.all(appends);
  await Promise.all([few.close(), small.close()]);
  const listed = names(await world.list(job));
  assert.deepEqual(
    listed.filter((name) => name !== "large"),
    ["1", "2", "3"],
  );
  assert.equal(listed.length, 6);
});

test("a publisher bounds its requests", async () => {
  for (const [options, most] of [
    [{}, 16],
    [{ maxRequests: 3 }, 3],
  ] as const) {
    const jobs: { jobId: string }[] = [];
    while (jobs.length < 20) jobs.push(await world.createJob());
    const { transport, inFlight } = counted();
    await using publisher = new Publisher(transport, options);
    await Promise.all(jobs.map((job) => publisher.append(job, info("a"))));
    await publisher.flush();
    assert.equal(Math.max(...inFlight), most);
    for (const job of jobs) assert.equal((await world.list(job)).length, 1);
  }
});

test("a batch fits into a request in each format, and an event that does not is refused at once", async () => {
  for (const useBinaryFormat of [true, false]) {
    const job = await world.createJob();
    const interceptors = [withCredential(world.secret)];
    const transport = createConnectTransport({
      baseUrl: server.origin,
      httpVersion: "2",
      useBinaryFormat,
      interceptors,
    });
    const publisher = new Publisher(transport, { onInterruption: (error) => Promise.reject(error) });
    const event = { ...info("quotes"), metadata: { text: '"'.repeat(15_000) } };
    await Promise.all(Array.from({ length: 130 }, () => publisher.append(job, event)));
    await assert.rejects(publisher.append(job, info("x".repeat(1024 * 1024))), { code: Code.OutOfRange });
    await publisher.close();
    assert.equal((await world.list(job)).length, 130);
  }
});

test("an event that is appended twice with one id is stored once", async () => {
  const job = await world.createJob();
  const ids: [string, boolean][] = [];
  const onStored = (_: JobRef, { id, existed }: { id: string; existed: boolean }) => void ids.push([id, existed]);
  const publisher = new Publisher(connectTo(server.origin, world.secret), { onStored, onRefused: assert.fail });
  const event = { id: crypto.randomUUID(), ...info("a") };
  for (const each of [info("first"), event, event]) void publisher.append(job, each);
  await publisher.close();
  assert.deepEqual(ids.slice(1), [
    [event.id, false],
    [event.id, true],
  ]);
  assert.equal((await world.list(job)).length, 2);
});

test("an error that no retry cures fails a publisher, and is told", async (t) => {
  const job = await world.createJob();
  const printed = t.mock.method(console, "error", () => {}).mock;
  const invalid = { name: "MilepostError", reason: "CREDENTIAL_INVALID" };
  const use = async (publisher: Publisher) => {
    await using used = publisher;
    await used.append(job, info("a"));
    await used.flush();
  };
  const wrong = () => new Publisher(connectTo(server.origin, "mpk_wrong"));
  await assert.rejects(use(wrong()), invalid);
  assert.equal(printed.callCount(), 0);

  const abandoned = wrong();
  await abandoned.append(job, info("a"));
  await until(() => printed.callCount() === 1);
  assert.match(String(printed.calls[0]?.arguments[0]), /1 events that are not stored/);
  for (const call of [() => abandoned.append(job, info("b")), () => abandoned.flush(), () => abandoned.close()]) {
    await assert.rejects(call, invalid);
  }
});

test("a publisher ends by its signal, by an error of a callback, and by close", async (t) => {
  const proxy = await startProxy(t);
  const job = await world.createJob();
  const control = new AbortController();
  const aborted = new Publisher(connectTo(proxy.origin, world.secret, "1.1"), { signal: control.signal, maxEvents: 1 });
  proxy.stall(true);
  await aborted.append(job, info("a"));
  const waiting = [aborted.append(job, info("b")), aborted.flush(), aborted.close()];
  const rejected = Promise.all(waiting.map((call) => assert.rejects(call, /enough/)));
  control.abort(new Error("enough"));
  await rejected;
  proxy.stall(false);
  await until(() => proxy.connections === 0);

  const onStored = () => Promise.reject(new Error("broken callback"));
  const failed = new Publisher(connectTo(server.origin, world.secret), { onStored });
  await failed.append(job, info("c"));
  await assert.rejects(failed.flush(), /broken callback/);

  const { signal } = new AbortController();
  const closed = new Publisher(connectTo(server.origin, world.secret), { signal });
  await closed.append(job, info("d"));
  await closed.close();
  await closed.close();
  await assert.rejects(closed.append(job, info("e")), /closed/);
  assert.deepEqual(getEventListeners(signal, "abort"), []);
  assert.deepEqual(names(await world.list(job)).slice(-2), ["c", "d"]);
});

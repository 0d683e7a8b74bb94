import assert from "node:assert/strict";
import { execFile } from "node:child_process";
import path from "node:path";
import { promisify } from "node:util";
import { server, test, world } from "./world.js";

/** Runs a program to its end, which it has to reach by itself, and returns the lines of its output. */
async function run(program: string, args: string[], env: Record<string, string>): Promise<string[]> {
  const file = path.join(import.meta.dirname, "..", program);
  const access = { MILEPOST_SERVER: server.origin, MILEPOST_API_KEY: world.secret };
  const { stdout } = await promisify(execFile)(process.execPath, [file, ...args], {
    env: { ...process.env, ...access, ...env },
  });
  return stdout.trimEnd().split("\n");
}

for (const transport of ["http1", "http2", "grpc"]) {
  test(`the conformance program comes to its end over ${transport}, and its process ends`, async () => {
    const [one, two] = [await world.createJob(), await world.createJob()];
    const jobs = [one.jobId, two.jobId];
    const env = { MILEPOST_ROUNDS: "10", MILEPOST_PAUSE_MS: "1", MILEPOST_TRANSPORT: transport };
    const output = await run("conformance/main.js", [], { MILEPOST_JOBS: jobs.join(), ...env });
    const lines = output.map((line) => JSON.parse(line) as Record<string, unknown>);
    const count = (kind: string, watch?: string) =>
      lines.filter((line) => line["kind"] === kind && (watch === undefined || line["watch"] === watch)).length;
    for (const job of jobs) assert.deepEqual([count("event", job), count("end", job)], [11, 1]);
    assert.deepEqual(
      [count("event", "all") >= 22, count("stored"), count("refused"), count("flushed")],
      [true, 22, 2, 1],
    );
  });
}

test("the example shows a job", async () => {
  const job = await world.createJob();
  await world.append(job, "scanned");
  await world.progress(job, "", 40);
  await world.complete(job);
  const lines = await run("examples/watch.js", [job.jobId], {});
  assert.deepEqual(lines.slice(0, 2), ["1 INFO scanned (0 %)", "2 PROGRESS Scan (40 %)"]);
  assert.equal(lines.at(-1), "the job is closed with 3 events");
});

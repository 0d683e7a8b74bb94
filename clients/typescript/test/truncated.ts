// Answers that a proxy ends too early and in good order, as some do when their server has gone.

import assert from "node:assert/strict";
import { once } from "node:events";
import { createServer, request as forward } from "node:http";
import type { AddressInfo } from "node:net";
import { createConnectTransport } from "@connectrpc/connect-node";
import { type AppendedEvent, EventKind, type JobRef, Publisher, watch, withCredential } from "@milepost/client";
import { server, test, world } from "./world.js";

/** The lengths at which the first answers of a method are cut: within a prefix and within a message. */
const LENGTHS = [0, 3, 5, 9, 40];

for (const useBinaryFormat of [true, false]) {
  test(`an answer that ends too early is a broken connection, in ${useBinaryFormat ? "binary" : "JSON"}`, async (t) => {
    const lengths = { WatchEvents: [...LENGTHS], AppendEvents: [...LENGTHS] };
    const proxy = createServer((request, response) => {
      const { url = "", method, headers } = request;
      const lengthsOfMethod = url.endsWith("WatchEvents") ? lengths.WatchEvents : lengths.AppendEvents;
      let rest = lengthsOfMethod.shift() ?? Number.POSITIVE_INFINITY;
      const sent = forward(`${server.origin}${url}`, { method, headers }, (answer) => {
        const { "content-length": _, ...kept } = answer.headers;
        response.writeHead(answer.statusCode ?? 500, kept);
        answer.on("data", (bytes: Buffer) => {
          response.write(bytes.subarray(0, rest));
          rest -= bytes.length;
          if (rest > 0) return;
          response.end();
          sent.destroy();
        });
        answer.on("end", () => response.end());
      });
      sent.on("error", () => response.end());
      response.on("close", () => sent.destroy());
      request.pipe(sent);
    }).listen(0, "127.0.0.1");
    await once(proxy, "listening");
    t.after(() => proxy.close());

    const baseUrl = `http://127.0.0.1:${(proxy.address() as AddressInfo).port}`;
    const interceptors = [withCredential(world.secret)];
    const transport = createConnectTransport({ baseUrl, httpVersion: "1.1", useBinaryFormat, interceptors });
    const job = await world.createJob();
    const stored: bigint[] = [];
    const seen: bigint[] = [];
    let interruptions = 0;
    const onInterruption = () => void interruptions++;
    const publish = async () => {
      const onStored = (_: JobRef, { sequence }: AppendedEvent) => void stored.push(sequence);
      await using publisher = new Publisher(transport, { onInterruption, onStored });
      await publisher.append(job, { kind: EventKind.INFO, name: "a" });
      await publisher.append(job, { kind: EventKind.COMPLETE });
    };
    const read = async () => {
      for await (const { sequence } of watch(transport, { ...job, onInterruption })) seen.push(sequence);
    };
    await Promise.all([publish(), read()]);
    assert.deepEqual(
      [stored, seen],
      [
        [1n, 2n],
        [1n, 2n],
      ],
    );
    assert.ok(interruptions >= 2 * LENGTHS.length, `${interruptions} interruptions`);
  });
}

// What all tests share: one server with its users.

import assert from "node:assert/strict";
import { after, before, test as nodeTest, type TestContext } from "node:test";
import { freePort, Proxy, Server, World } from "./server.js";

export let server: Server;
export let world: World;
/** A test that fails if it does not come to its end, on however busy a machine. */
export const test = (name: string, act: (t: TestContext) => Promise<void>) =>
  void nodeTest(name, { timeout: 600_000 }, act);

/** A proxy in front of the server, for one test. */
export async function startProxy(t: TestContext): Promise<Proxy> {
  const proxy = await Proxy.start(server.port);
  t.after(() => proxy.close());
  return proxy;
}

/** The port of a page that may call the server. */
export const pagePort = await freePort();

const warnings: Error[] = [];
process.on("warning", (warning) => warnings.push(warning));

before(async () => {
  server = new Server(await freePort(), ["--allow-origin", `http://127.0.0.1:${pagePort}`]);
  await server.start();
  world = await World.create(server.origin);
});

after(async () => {
  await server.stop();
  assert.deepEqual(warnings, []);
});

// A milepost server with a database of its own, which a test can kill and start again.

import { spawn } from "node:child_process";
import { once } from "node:events";
import { chmodSync, existsSync, mkdtempSync, rmSync } from "node:fs";
import { createServer } from "node:net";
import path from "node:path";
import { Grpc } from "./grpc.js";

export const ROOT = path.resolve(import.meta.dirname, "../../..");
const BINARY = process.env.MILEPOST_BIN ?? path.resolve(ROOT, process.env.CARGO_TARGET_DIR ?? "target", "debug/milepost");

export async function freePort() {
  const server = createServer().listen(0, "127.0.0.1");
  await once(server, "listening");
  const { port } = server.address();
  server.close();
  await once(server, "close");
  return port;
}

/** Ends a process and waits for its end. */
export async function end(child, signal = "SIGTERM") {
  if (child.exitCode !== null || child.signalCode !== null) return;
  child.kill(signal);
  await once(child, "exit");
}

export class Server {
  static async start(options = []) {
    if (!existsSync(BINARY)) throw new Error(`${BINARY} is missing: run cargo build, or set MILEPOST_BIN`);
    const server = new Server();
    server.options = options;
    // The embedded Postgres runs as another user, where the tests run as root.
    server.directory = mkdtempSync("/tmp/milepost-browser-");
    chmodSync(server.directory, 0o755);
    server.port = await freePort();
    server.origin = `http://127.0.0.1:${server.port}`;
    server.grpc = new Grpc(`127.0.0.1:${server.port}`);
    await server.run();
    return server;
  }

  async run() {
    const stdio = process.env.MILEPOST_BROWSER_VERBOSE ? "inherit" : "ignore";
    const options = [
      "--listen",
      `127.0.0.1:${this.port}`,
      "--data-dir",
      path.join(this.directory, "data"),
      "--bcrypt-cost",
      "4",
      ...this.options,
    ];
    this.process = spawn(BINARY, ["serve", ...options], { stdio });
    await this.grpc.ready();
    await this.answers();
  }

  /** Waits until the page is served. */
  async answers() {
    for (;;) {
      const response = await fetch(this.origin).catch(() => null);
      if (response?.ok) return;
      await new Promise(resolve => setTimeout(resolve, 50));
    }
  }

  async kill() {
    await end(this.process, "SIGKILL");
  }

  async stop() {
    this.grpc.close();
    await end(this.process);
    rmSync(this.directory, { recursive: true, force: true });
  }
}

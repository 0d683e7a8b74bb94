import { create, type MessageInitShape, toBinary } from "@bufbuild/protobuf";
import { durationFromMs } from "@bufbuild/protobuf/wkt";
import { type Client, Code, ConnectError, createClient, type Transport } from "@connectrpc/connect";
import { isTransient, MilepostError } from "./error.js";
import {
  type AllJobsSchema,
  type CaughtUp,
  type Event,
  type EventKind,
  EventService,
  type JobState,
  WatchEndReason,
  type WatchEventsRequest,
  WatchEventsRequestSchema,
  type WatchEventsResponse,
} from "./generated/milepost/v1/events_pb.js";
import { type JobRef, jobOf } from "./job.js";
import { abortedWith, pauseAfter, sleep } from "./wait.js";

const HEARTBEAT_MS = 15_000;
const SHORTEST_HEARTBEAT_MS = 5_000;
const LONGEST_HEARTBEAT_MS = 60_000;

/** What to watch: one job, or all jobs that the caller may see, also those that are created later. */
export type WatchScope = JobRef | { allJobs: MessageInitShape<typeof AllJobsSchema> };

/** Where to start. `afterSequence` is for a watch of one job. */
export type WatchStart = "beginning" | "now" | { afterSequence: bigint } | { resumeToken: string };

/** What to watch, and how. Callbacks are called between events, and the watch waits for what they return. */
export type WatchOptions = WatchScope & {
  /** Only events of these kinds. Default: all kinds. */
  kinds?: EventKind[];
  /** Default: the beginning. */
  start?: WatchStart;
  /** The time without a message after which the server sends a heartbeat: cut to 5 to 60 s, default 15 s. */
  heartbeatIntervalMs?: number;
  /** Ends the watch, which then throws the signal's reason. */
  signal?: AbortSignal;
  /**
   * All events of the past were handed out: at the start, and again after each interruption. In a watch of one job the
   * message has the state of the job and of each step.
   */
  onCaughtUp?: (message: CaughtUp) => void | Promise<void>;
  /** There was nothing to send, and the watch works. */
  onHeartbeat?: () => void | Promise<void>;
  /** The watch was interrupted and will be resumed after the pause. */
  onInterruption?: (error: MilepostError, pauseMs: number) => void | Promise<void>;
};

/** Events, like those of a generator: they can be iterated once. */
export interface Watch extends AsyncIterableIterator<Event> {
  /**
   * The start of a watch that goes on after this one, with the same scope and kinds. The token is that of the last
   * message whose events were all processed: the loop has asked for the next event.
   */
  readonly resumeToken: string | undefined;
  /** The final state of the job, after the watch of one job has ended. */
  readonly end: JobState | undefined;
  /** Ends the watch at once, also while the loop waits for an event. */
  return(): Promise<IteratorResult<Event, void>>;
}

/**
 * Watches events: each exactly once and those of a job in order, whatever happens to connections and servers. The watch
 * of one job ends when the job is closed; a watch of all jobs does not end by itself. Leaving the loop ends the call.
 *
 * The loop throws a {@link MilepostError} that no retry cures, and what a callback throws.
 */
export const watch = (transport: Transport, options: WatchOptions): Watch => new ResumingWatch(transport, options);

class ResumingWatch implements Watch {
  resumeToken: string | undefined;
  end: JobState | undefined;
  readonly #events: AsyncGenerator<Event, void, undefined>;
  #control: AbortController | undefined;

  constructor(transport: Transport, options: WatchOptions) {
    const request = requestOf(options);
    if (request.start.case === "resumeToken") this.resumeToken = request.start.value;
    this.#events = this.#run(createClient(EventService, transport), request, options);
  }

  next() {
    return this.#events.next();
  }

  return() {
    this.#control?.abort();
    return this.#events.return();
  }

  [Symbol.asyncIterator]() {
    return this;
  }

  async *#run(client: Client<typeof EventService>, request: WatchEventsRequest, options: WatchOptions) {
    const control = (this.#control = abortedWith(options.signal));
    const { signal } = control;
    let failures = 0;
    try {
      while (!signal.aborted) {
        const call = abortedWith(signal);
        // Without a deadline, whatever the transport has as its default.
        const messages = client.watchEvents(request, { signal: call.signal, timeoutMs: 0 })[Symbol.asyncIterator]();
        let received: WatchEventsResponse | MilepostError;
        let heard = false;
        try {
          while (!((received = await receive(messages, call, silenceMs(options))) instanceof MilepostError)) {
            heard = true;
            failures = 0;
            request.start = { case: "resumeToken", value: received.resumeToken };
            const { message, resumeToken } = received;
            if (message.case === "events") {
              for (const event of message.value.events) {
                options.signal?.throwIfAborted();
                yield event;
              }
            } else if (message.case === "caughtUp") await options.onCaughtUp?.(message.value);
            else if (message.case === "heartbeat") await options.onHeartbeat?.();
            this.resumeToken = resumeToken;
            if (message.case === "end" && message.value.reason === WatchEndReason.JOB_CLOSED) {
              this.end = message.value.job;
              return;
            }
          }
        } finally {
          call.abort();
          void drain(messages);
        }
        if (signal.aborted) break;
        if (!isTransient(received, heard)) throw received;
        const pauseMs = pauseAfter(failures++, received);
        await options.onInterruption?.(received, pauseMs);
        await sleep(pauseMs, signal);
      }
    } finally {
      control.abort();
    }
    options.signal?.throwIfAborted();
  }
}

/** The next message, or why there is none. Only the time in here counts as silence of the server. */
async function receive(messages: AsyncIterator<WatchEventsResponse>, call: AbortController, silenceMs: number) {
  const silent = () => call.abort(new ConnectError(`no message came for ${silenceMs / 1000} s`, Code.Unavailable));
  const timer = setTimeout(silent, silenceMs);
  try {
    const { done, value } = await messages.next();
    if (done) throw new ConnectError("the stream ended without an end message", Code.Unavailable);
    return value;
  } catch (error) {
    return MilepostError.from(error);
  } finally {
    clearTimeout(timer);
  }
}

/**
 * Reads what was received and not handed out. Without that, connect-node keeps a stream that the server has ended, and
 * with it the process.
 */
async function drain(messages: AsyncIterator<WatchEventsResponse>): Promise<void> {
  const ended = () => ({ done: true });
  while (!(await messages.next().catch(ended)).done);
}

/** The time without a message after which a connection counts as broken. */
function silenceMs({ heartbeatIntervalMs = HEARTBEAT_MS }: WatchOptions): number {
  return 2 * Math.min(Math.max(heartbeatIntervalMs, SHORTEST_HEARTBEAT_MS), LONGEST_HEARTBEAT_MS) + 5_000;
}

function requestOf(options: WatchOptions): WatchEventsRequest {
  const { start = "beginning", heartbeatIntervalMs = HEARTBEAT_MS, kinds = [] } = options;
  const request = create(WatchEventsRequestSchema, {
    scope: "allJobs" in options ? { case: "allJobs", value: options.allJobs } : jobOf(options),
    kinds,
    start: startOf(start),
    heartbeatInterval: durationFromMs(heartbeatIntervalMs),
  });
  // What cannot be encoded is an error of the caller and not of a connection.
  toBinary(WatchEventsRequestSchema, request);
  return request;
}

function startOf(start: WatchStart) {
  if (start === "beginning") return { case: undefined };
  if (start === "now") return { case: "fromNow", value: {} } as const;
  if ("afterSequence" in start) return { case: "afterSequence", value: start.afterSequence } as const;
  return { case: "resumeToken", value: start.resumeToken } as const;
}

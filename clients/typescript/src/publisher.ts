/// <reference lib="esnext.disposable" preserve="true" />
import { create, fromBinary, type MessageInitShape, toBinary, toJsonString } from "@bufbuild/protobuf";
import { timestampDate } from "@bufbuild/protobuf/wkt";
import { type Client, Code, ConnectError, createClient, type Transport } from "@connectrpc/connect";
import { isTransient, MilepostError } from "./error.js";
import {
  type AppendedEvent,
  type AppendEventsResponse,
  EventService,
  type NewEvent,
  NewEventSchema,
} from "./generated/milepost/v1/events_pb.js";
import { type JobRef, jobOf, keyOf, RecentJobs } from "./job.js";
import { uuidV7 } from "./uuid.js";
import { abortedWith, pauseAfter, sleep } from "./wait.js";

const BATCH_EVENTS = 500;
/** A request has at most 1 MiB. */
const BATCH_BYTES = 900 * 1024;
const TOLD_JOBS = 10_000;

const { Aborted, AlreadyExists, FailedPrecondition, InvalidArgument, NotFound, OutOfRange } = Code;
/** Codes of a refusal for the content of a batch. */
const REFUSALS = [Aborted, AlreadyExists, FailedPrecondition, InvalidArgument, NotFound, OutOfRange];

/** The fields of an event to append. */
export type EventInit = MessageInitShape<typeof NewEventSchema>;

/** Limits and callbacks. A job waits for what its callbacks return, so that they must not await the publisher. */
export interface PublisherOptions {
  /** Most events that the publisher holds. Default: 10,000. */
  maxEvents?: number;
  /** Most bytes of the events that the publisher holds, as binary or as JSON, whichever is more. Default: 16 MiB. */
  maxBytes?: number;
  /** Most requests in flight. Default: 16. */
  maxRequests?: number;
  /** The deadline of each attempt. Default: 10 s. */
  attemptTimeoutMs?: number;
  /** Fails the publisher with the signal's reason. It then drops the events that it holds. */
  signal?: AbortSignal;
  /** A request failed, and will be sent again after the pause. */
  onInterruption?: (error: MilepostError, pauseMs: number) => void | Promise<void>;
  /** An event was refused. Without this callback, `flush` and `close` throw the first refusal. */
  onRefused?: (job: JobRef, event: NewEvent, error: MilepostError) => void | Promise<void>;
  /** An event is stored. Called in the order of the events of a job. */
  onStored?: (job: JobRef, event: AppendedEvent) => void | Promise<void>;
  /**
   * The customer of a job asked to stop it, at this time. Called after the first answer that says so, with the job as
   * it was given. A publisher calls it once for a job. It can call it again if answers said so of 10,000 other jobs
   * since the job's last answer. A publisher of a restarted program calls it again.
   */
  onCancellationRequested?: (job: JobRef, requestedAt: Date) => void | Promise<void>;
}

/** An event that is neither stored nor refused. `order` is the number of its call of `append`. */
type Unsettled = { readonly order: number; readonly bytes: Uint8Array; readonly size: number };

/** The events of a job that are not in flight. */
type Queue = { readonly key: string; readonly job: JobRef; readonly events: Unsettled[] };

/**
 * Appends events to jobs: those of a job in order, each once, whatever happens to connections and servers. The order
 * holds if a job is always named in the same way. At the end call `close`, or declare the publisher by `await using`.
 *
 * An error that no retry cures fails the publisher: `append`, `flush` and `close` throw it from then on.
 */
export class Publisher implements AsyncDisposable {
  readonly #client: Client<typeof EventService>;
  readonly #options: PublisherOptions;
  /** Aborted with the reason for which the publisher failed or was closed. */
  readonly #control: AbortController;
  /** The queues of jobs with a request in flight, and those in `#ready`. */
  readonly #queues = new Map<string, Queue>();
  readonly #ready: Queue[] = [];
  /** One for each request. A signal with more than ten listeners makes Node.js warn of a leak. */
  readonly #requests = new Set<AbortController>();
  /** In the order of the calls of `append`, also of those that wait for room. */
  readonly #unsettled = new Set<Unsettled>();
  /** Calls that wait until events are settled. */
  readonly #waiting: (() => void)[] = [];
  /** Those of which `onCancellationRequested` was told. */
  readonly #told = new RecentJobs(TOLD_JOBS);
  #lastAppend = Promise.resolve();
  #order = 0;
  #heldEvents = 0;
  #heldBytes = 0;
  #refusal: MilepostError | undefined;
  #failureWasThrown = false;
  #closed: Promise<void> | undefined;

  constructor(transport: Transport, options: PublisherOptions = {}) {
    this.#client = createClient(EventService, transport);
    this.#options = options;
    this.#control = abortedWith(options.signal);
    const { signal } = this.#control;
    signal.addEventListener("abort", () => {
      const lost = this.#unsettled.size;
      if (lost > 0 && this.#waiting.length === 0 && !options.signal?.aborted) {
        console.error(`milepost: a publisher failed with ${lost} events that are not stored:`, signal.reason);
      }
      this.#ready.length = 0;
      for (const request of this.#requests) request.abort();
      this.#wake();
    });
  }

  /**
   * Puts an event into the queue of its job, with a new id if the event has none. Waits while the publisher holds as
   * much as it may, and not for the server. Throws for an event that cannot be encoded or has more than 900 KiB.
   */
  async append(job: JobRef, init: EventInit): Promise<void> {
    this.#check();
    if (this.#closed) throw new Error("the publisher is closed");
    const event = create(NewEventSchema, init);
    const withId = { ...event, id: event.id || uuidV7() };
    const bytes = toBinary(NewEventSchema, withId);
    // The server limits the size of a request in the format that the transport has chosen.
    const size = Math.max(bytes.length, new TextEncoder().encode(toJsonString(NewEventSchema, withId)).length);
    if (size > BATCH_BYTES) throw MilepostError.from(new ConnectError(`the event has ${size} bytes`, OutOfRange));
    const unsettled = { order: ++this.#order, bytes, size };
    this.#unsettled.add(unsettled);
    await (this.#lastAppend = this.#lastAppend.then(() => this.#hold(job, unsettled)));
  }

  /**
   * Waits until all events are stored or refused for which `append` was called before. Throws the first refusal since
   * the last flush if there is no `onRefused`.
   */
  async flush(): Promise<void> {
    this.#check();
    const last = this.#order;
    for (let [oldest] = this.#unsettled; oldest && oldest.order <= last; [oldest] = this.#unsettled) {
      await this.#settled();
    }
    const refusal = this.#refusal;
    this.#refusal = undefined;
    if (refusal) throw refusal;
  }

  /** Takes no more events, and flushes. */
  close(): Promise<void> {
    return (this.#closed ??= this.flush().finally(() => this.#control.abort(new Error("the publisher is closed"))));
  }

  /** Closes the publisher, unless `close` was called or a failure was thrown before. */
  async [Symbol.asyncDispose](): Promise<void> {
    if (!this.#closed && !this.#failureWasThrown) await this.close();
  }

  #check(): void {
    this.#failureWasThrown = this.#control.signal.aborted;
    this.#control.signal.throwIfAborted();
  }

  /** Waits until some events are settled. */
  async #settled(): Promise<void> {
    await new Promise<void>((resolve) => this.#waiting.push(resolve));
    this.#check();
  }

  #wake(): void {
    for (const resolve of this.#waiting.splice(0)) resolve();
  }

  async #hold(job: JobRef, event: Unsettled): Promise<void> {
    this.#check();
    const { maxEvents = 10_000, maxBytes = 16 * 1024 * 1024 } = this.#options;
    const isFull = () => this.#heldEvents >= maxEvents || this.#heldBytes + event.size > maxBytes;
    while (this.#heldEvents > 0 && isFull()) await this.#settled();
    this.#heldEvents++;
    this.#heldBytes += event.size;
    const key = keyOf(job);
    const queue = this.#queues.get(key) ?? { key, job, events: [] };
    queue.events.push(event);
    if (!this.#queues.has(key)) this.#ready.push(queue);
    this.#queues.set(key, queue);
    this.#start();
  }

  #start(): void {
    const { maxRequests = 16 } = this.#options;
    while (this.#requests.size < maxRequests && !this.#control.signal.aborted) {
      const queue = this.#ready.shift();
      if (!queue) return;
      void this.#work(queue);
    }
  }

  /** Sends the next batch of a job. After that it is the turn of other jobs. */
  async #work(queue: Queue): Promise<void> {
    const request = new AbortController();
    this.#requests.add(request);
    try {
      await this.#send(queue.job, takeBatch(queue.events), request.signal);
    } catch (error) {
      this.#control.abort(error);
    }
    this.#requests.delete(request);
    if (queue.events.length > 0) this.#ready.push(queue);
    else this.#queues.delete(queue.key);
    this.#start();
  }

  /** Sends a batch until all its events are stored or refused. */
  async #send(job: JobRef, batch: readonly Unsettled[], signal: AbortSignal): Promise<void> {
    const { attemptTimeoutMs: timeoutMs = 10_000, onInterruption, onRefused } = this.#options;
    const request = { job: jobOf(job), events: batch.map(({ bytes }) => fromBinary(NewEventSchema, bytes)) };
    for (let failures = 0; ; failures++) {
      const call = this.#client.appendEvents(request, { signal, timeoutMs }).then((answer) => {
        if (answer.events.length === batch.length) return answer;
        throw new ConnectError("the answer ended too early", Code.Unavailable);
      });
      const answer = await call.catch(MilepostError.from);
      if (!(answer instanceof MilepostError)) {
        await this.#tell(job, answer);
        return this.#settle(batch);
      }
      signal.throwIfAborted();
      if (isTransient(answer)) {
        const pauseMs = pauseAfter(failures, answer);
        await onInterruption?.(answer, pauseMs);
        await sleep(pauseMs, signal);
        continue;
      }
      if (!REFUSALS.includes(answer.code)) throw answer;
      if (batch.length > 1) {
        // Only the events at fault are to be refused.
        for (const event of batch) await this.#send(job, [event], signal);
        return;
      }
      for (const event of request.events) {
        if (onRefused) await onRefused(job, event, answer);
        else this.#refusal ??= answer;
      }
      return this.#settle(batch);
    }
  }

  async #tell(job: JobRef, { events, cancellationRequestedAt }: AppendEventsResponse): Promise<void> {
    const { onStored, onCancellationRequested } = this.#options;
    for (const event of events) await onStored?.(job, event);
    if (onCancellationRequested && cancellationRequestedAt && this.#told.add(job)) {
      await onCancellationRequested(job, timestampDate(cancellationRequestedAt));
    }
  }

  #settle(batch: readonly Unsettled[]): void {
    for (const event of batch) {
      this.#unsettled.delete(event);
      this.#heldEvents--;
      this.#heldBytes -= event.size;
    }
    this.#wake();
  }
}

/** Removes as many events from the start of a queue as fit into a request. */
function takeBatch(events: Unsettled[]): Unsettled[] {
  let bytes = 0;
  const rest = events.findIndex(({ size }, i) => i === BATCH_EVENTS || (bytes += size) > BATCH_BYTES);
  return events.splice(0, rest < 0 ? events.length : rest);
}

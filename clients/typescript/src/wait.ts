import type { MilepostError } from "./error.js";

const FIRST_PAUSE_MS = 100;
const LONGEST_PAUSE_MS = 5_000;

/**
 * The pause after `failures` failures in a row and one more. Half of it is by chance, so that the clients of a server
 * that restarts do not all come back at once.
 */
export function pauseAfter(failures: number, { retryDelayMs = 0 }: MilepostError): number {
  const pauseMs = Math.min(LONGEST_PAUSE_MS, FIRST_PAUSE_MS * 2 ** failures);
  return Math.max(retryDelayMs, Math.round(pauseMs * (0.5 + Math.random() / 2)));
}

/** Waits, but not longer than until the signal is aborted. */
export function sleep(ms: number, signal: AbortSignal): Promise<void> {
  return new Promise((resolve) => {
    if (signal.aborted) return resolve();
    const done = () => {
      clearTimeout(timer);
      signal.removeEventListener("abort", done);
      resolve();
    };
    const timer = setTimeout(done, ms);
    signal.addEventListener("abort", done);
  });
}

/** A controller that is aborted with the signal. When it is aborted itself, the signal forgets it. */
export function abortedWith(signal: AbortSignal | undefined): AbortController {
  const control = new AbortController();
  const abort = () => control.abort(signal?.reason);
  if (signal?.aborted) abort();
  signal?.addEventListener("abort", abort, { signal: control.signal });
  return control;
}

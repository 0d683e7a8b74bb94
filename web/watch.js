// The one loop behind every live view. It opens a stream, notices when the stream is silent, and goes on after it.
//
//   catching ──caught_up──▶ live ──job closed──▶ complete
//      ▲                      │
//      │  the connection is lost: pause, longer each time (offline)
//      │  the tab is hidden: no stream until it is seen again (paused)
//      │  two heartbeats stay away: a fresh stream at once
//      └──────────────────────┘
//   No answer of a fresh stream within FIRST_MS, while calls are answered, means a proxy that holds streams back: the
//   view reads by pages (paged) and tries a stream now and then, until one is caught up.
//
// The view gives: `request()`, the message of the next WatchEvents; `deliver(message)`; `readPages(signal)`, which reads
// what is new by calls and tells whether nothing more can come; `restart()`, which forgets what was received; and
// `report(state)`.

import { ApiError } from "./api.js";

const HEARTBEAT_S = 10;
const SILENT_MS = (2 * HEARTBEAT_S + 1) * 1000;
const FIRST_MS = 5000;
const PAGES_MS = 2000;
const TRIALS_MS = [15_000, 30_000, 60_000];
const LONGEST_PAUSE_S = 30;

/** What a view received is not a part of the log any more. */
export class SetBack extends Error {}

export class Watch {
	#client;
	#view;
	#control;
	#wake;
	#name;
	#failures = 0;
	#trials = 0;
	#paged = false;
	#stopped = false;
	#listener = () => this.#seen();

	constructor(client, view) {
		this.#client = client;
		this.#view = view;
		document.addEventListener("visibilitychange", this.#listener);
		addEventListener("online", this.#listener);
		this.#run();
	}

	stop() {
		this.#stopped = true;
		document.removeEventListener("visibilitychange", this.#listener);
		removeEventListener("online", this.#listener);
		this.#control?.abort("stopped");
		this.#wake?.();
	}

	/** Ends a pause. */
	retry() {
		this.#wake?.();
	}

	#seen() {
		if (document.hidden) this.#control?.abort("hidden");
		this.#wake?.();
	}

	#report(name, details) {
		this.#name = name;
		if (!this.#stopped) this.#view.report({ name, ...details });
	}

	async #run() {
		while (!this.#stopped) {
			if (document.hidden) {
				this.#report("paused");
				await this.#pause(24 * 3600_000);
				continue;
			}
			const end = await this.#follow();
			if (await this.#over(end)) return this.stop();
		}
	}

	/** What comes after a stream: true when nothing does. */
	async #over({ how, error, wasLive }) {
		const last = { closed: "complete", expired: "expired", ended: "ended" }[how];
		if (last) this.#report(last, { error });
		// A stream that did work was cut somewhere, as by a sleep of this device.
		if (how === "silent" && !wasLive) return this.#over(await this.#pagesUntilTrial());
		if (how === "restart") this.#view.restart();
		if (how === "restart" || how === "lost") await this.#lost(error);
		return Boolean(last);
	}

	async #lost(error) {
		this.#paged = false;
		const ms = pauseMs(this.#failures++, error);
		this.#report("offline", { at: Date.now() + ms, error });
		await this.#pause(ms);
	}

	async #follow() {
		const control = (this.#control = new AbortController());
		const { signal } = control;
		const request = this.#view.request();
		const trial = this.#paged;
		let wasLive = false,
			heardAt = Date.now();
		const heard = () => {
			heardAt = Date.now();
		};
		// A device that slept finds the time passed by at the first turn.
		const watchdog = setInterval(() => {
			if (Date.now() - heardAt > (wasLive ? SILENT_MS : FIRST_MS)) control.abort("silent");
		}, 500);
		// A trial does not stop the reading by pages.
		const pages = new AbortController();
		if (trial)
			this.#pages(AbortSignal.any([signal, pages.signal])).then(end => {
				if (end.how !== "time") control.abort(end);
			});
		else this.#report("catching");
		try {
			for await (const message of this.#client.stream(
				"EventService/WatchEvents",
				{ ...request, heartbeatInterval: `${HEARTBEAT_S}s` },
				signal,
				heard,
			)) {
				if (signal.aborted) break;
				this.#view.deliver(message);
				if (message.end?.reason === "WATCH_END_REASON_JOB_CLOSED") return { how: "closed" };
				if (!message.caughtUp) continue;
				wasLive = true;
				this.#paged = false;
				this.#failures = this.#trials = 0;
				pages.abort();
				this.#report("live");
			}
			return signal.aborted ? aborted(signal, wasLive) : { how: "lost" };
		} catch (error) {
			if (signal.aborted) return aborted(signal, wasLive);
			return ending(error, request);
		} finally {
			clearInterval(watchdog);
			control.abort("stopped");
		}
	}

	async #pagesUntilTrial() {
		this.#paged = true;
		const control = (this.#control = new AbortController());
		const gap = TRIALS_MS[Math.min(this.#trials++, TRIALS_MS.length - 1)];
		const timer = setTimeout(() => control.abort("time"), gap);
		try {
			return await this.#pages(control.signal);
		} finally {
			clearTimeout(timer);
		}
	}

	/** Reads by pages until the signal is aborted, a call fails or nothing more can come. */
	async #pages(signal) {
		while (!signal.aborted) {
			try {
				if (await this.#view.readPages(signal)) return { how: "closed" };
			} catch (error) {
				return signal.aborted ? { how: "time" } : ending(error, {});
			}
			if (signal.aborted) break;
			this.#failures = 0;
			if (this.#name !== "paged") this.#report("paged");
			await this.#pause(PAGES_MS, signal);
		}
		return { how: "time" };
	}

	/** Waits, unless something ends the wait. */
	#pause(ms, signal) {
		if (this.#stopped) return Promise.resolve();
		return new Promise(resolve => {
			const done = () => {
				clearTimeout(timer);
				signal?.removeEventListener("abort", done);
				resolve();
			};
			const timer = setTimeout(done, ms);
			signal?.addEventListener("abort", done);
			this.#wake = done;
		});
	}
}

const aborted = (signal, wasLive) =>
	typeof signal.reason === "object" ? signal.reason : { how: signal.reason, wasLive };

/** What an error of a stream or of a page asks for. */
function ending(error, request) {
	if (error instanceof SetBack) return { how: "restart", error };
	if (!(error instanceof ApiError)) {
		// A fault of this page is no fault of the connection: it is not tried again for ever.
		console.error(error);
		return { how: "ended", error };
	}
	if (error.reason === "EVENTS_EXPIRED") return { how: "expired", error };
	if (error.code === "out_of_range" || (error.code === "invalid_argument" && request.resumeToken))
		return { how: "restart", error };
	return { how: error.passing ? "lost" : "ended", error };
}

/** How long to wait after so many failures before this one. */
export function pauseMs(failures, error) {
	const longest = Math.min(LONGEST_PAUSE_S, 2 ** failures) * 1000;
	// A random part, so that the pages of a server that was started again do not come all at once.
	return Math.max(error?.retryMs ?? 0, longest * (0.5 + Math.random() / 2));
}

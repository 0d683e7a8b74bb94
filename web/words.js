// How the page says numbers, times and states.

const SPACE = "\u00a0";

export const STATUSES = ["pending", "running", "stalled", "failed", "complete", "cancelled"];
export const KIND = { step: "Step done", info: "Note", close: "Closed" };

/** `JOB_STATUS_RUNNING` becomes `running`. */
export const plain = (prefix, name) => `${name ?? ""}`.replace(prefix, "").toLowerCase();

/** What has no other word, as a state that is newer than the page, is shown by its own name. */
export const word = (name, words = {}) =>
	words[name] ?? name.charAt(0).toUpperCase() + name.slice(1).replaceAll("_", " ");

export const number = value => value.toLocaleString("en-GB", { maximumFractionDigits: 6 }).replace("-", "\u2212");
export const percent = value => `${value}${SPACE}%`;
export const plural = (count, noun) => `${number(count)} ${noun}${count === 1 ? "" : "s"}`;

const UNITS = [
	[86400, "d"],
	[3600, "h"],
	[60, "min"],
	[1, "s"],
];

/** Milliseconds in their largest units: in one, or in two of them. */
export function about(ms, count = 1) {
	const s = Math.max(0, Math.floor(ms / 1000)),
		at = UNITS.findIndex(([size]) => size <= s || size === 1),
		[size, name] = UNITS[at],
		most = `${Math.floor(s / size)}${SPACE}${name}`;
	return count > 1 && s % size >= UNITS[at + 1]?.[0] ? `${most} ${about(1000 * (s % size))}` : most;
}

export const span = ms => about(ms, 2);
export const ago = (ms, now) => `${about(now - ms)} ago`;

const format = options => {
	const formatter = new Intl.DateTimeFormat("en-GB", options);
	return ms => formatter.format(ms);
};
export const minutes = format({ timeStyle: "short" });
export const clock = format({ timeStyle: "medium" });
export const day = format({ dateStyle: "medium" });
export const when = ms => `${day(ms)}, ${minutes(ms)}`;
export const exact = ms => `${clock(ms)}.${`${ms % 1000}`.padStart(3, "0")}`;
export const iso = ms => new Date(ms).toISOString();

/** Milliseconds of a timestamp in JSON, or undefined. */
export const time = text => (text ? Date.parse(text) : undefined);

export const fullName = person => [person?.firstName, person?.lastName].filter(Boolean).join(" ");
export const nameOf = person => fullName(person) || `${person?.id.slice(0, 8)}…`;

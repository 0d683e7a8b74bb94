// How the page says numbers, times and states.

const SPACE = "\u00a0";

export const STATUS = {
	pending: "Pending",
	running: "Running",
	failed: "Failed",
	complete: "Complete",
	cancelled: "Cancelled",
};
export const KIND = { step: "Step done", info: "Note", error: "Error", complete: "Complete", close: "Closed" };

/** `JOB_STATUS_RUNNING` becomes `running`. */
export const plain = (prefix, name) => `${name ?? ""}`.replace(prefix, "").toLowerCase();

/** A state that is newer than this page is shown by its own name. */
export const word = (words, name) => words[name] ?? name.charAt(0).toUpperCase() + name.slice(1).replaceAll("_", " ");

export const number = value => value.toLocaleString("en-GB", { maximumFractionDigits: 6 }).replace("-", "\u2212");
export const percent = value => `${value}${SPACE}%`;
export const plural = (count, noun) => `${number(count)} ${noun}${count === 1 ? "" : "s"}`;

/** Seconds in their largest unit. */
export function about(seconds) {
	const s = Math.max(0, Math.floor(seconds));
	if (s < 60) return `${s}${SPACE}s`;
	if (s < 3600) return `${Math.floor(s / 60)}${SPACE}min`;
	if (s < 86400) return `${Math.floor(s / 3600)}${SPACE}h`;
	return `${Math.floor(s / 86400)}${SPACE}d`;
}

/** Seconds in their two largest units. */
export function span(seconds) {
	const s = Math.max(0, Math.floor(seconds));
	const rest = s < 3600 ? s % 60 : s < 86400 ? s % 3600 : s % 86400;
	const small = s < 3600 ? 1 : s < 86400 ? 60 : 3600;
	return s >= 60 && rest >= small ? `${about(s)} ${about(rest)}` : about(s);
}

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

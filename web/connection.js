// The state of the connection, always in sight: the same words for a job and for the list of jobs.

import { $, fill, h, icon, setAttribute, setText } from "./dom.js";
import { about } from "./words.js";

const WORDS = {
	live: "Live",
	catching: "Catching up",
	paged: "Reading by pages, every 2\u00a0s",
	paused: "Paused while hidden",
	complete: "All received",
	expired: "Events removed",
	ended: "Ended",
};
const ICONS = { paused: "offline", expired: "look", ended: "offline" };

/** Shows a state of a watch. `retry` ends its pause, `catching` says how far it is. */
export function showConnection(element, { name, at }, { catching, retry }) {
	setAttribute(element, "data-s", name);
	fill(element, [name], () => [
		icon(ICONS[name] ?? name),
		h("span"),
		name === "offline" && h("button.textual", { click: retry }, "Try now"),
	]);
	const offline = `Offline, next try in ${about(Math.max(1000, at - Date.now() + 500))}`;
	setText(
		$("span", element),
		name === "offline" ? offline : name === "catching" ? catching || WORDS.catching : WORDS[name],
	);
}

// Starts the page: the colours, and the view that the address asks for.

import { openProfile, openSignIn, openSignUp } from "./account.js";
import { Client } from "./api.js";
import { $, $$, attempt, h, icon, setAttribute, setText } from "./dom.js";
import { openJob } from "./job.js";
import { openJobs } from "./jobs.js";
import { openKeys } from "./keys.js";
import { go, route } from "./router.js";
import { client, forget, signedIn, whoAmI } from "./session.js";
import { pauseMs } from "./watch.js";

const main = $("#main");
const THEME = "milepost.theme",
	NEXT = { auto: "light", light: "dark", dark: "auto" };
let close = null,
	opening = null,
	failures = 0;

function paint(theme) {
	document.documentElement.dataset.theme = theme;
	const button = $("#theme");
	button.replaceChildren(icon(theme));
	button.ariaLabel = `Colours: ${theme === "auto" ? "as the system" : theme}. Change`;
}

function changeTheme() {
	const theme = NEXT[document.documentElement.dataset.theme];
	paint(theme);
	// Without storage the choice lasts as long as the document.
	attempt(() => localStorage.setItem(THEME, theme));
}

/** Opens the view of the address. A view that is not shown yet when the next one is asked for is given up. */
async function open(focus) {
	opening?.abort("another view");
	const { signal } = (opening = new AbortController());
	close?.();
	close = null;
	const { path, parameters } = route(),
		token = parameters.get("token");
	showNavigation(path[0], !token && signedIn(), token);
	try {
		const closing = await view(path, token, parameters, signal);
		if (signal.aborted) closing?.();
		else close = closing ?? null;
		failures = 0;
	} catch (error) {
		if (signal.aborted) return;
		failed(error, token, path);
	}
	if (focus) main.focus({ preventScroll: true });
	if (focus) scrollTo(0, 0);
}

async function view([at, id], token, parameters, signal) {
	// The token of a link wins over the session of the tab: it shows one job, and what it may see of it.
	if (token && at === "jobs" && id) {
		const shared = new Client(token);
		const who = await shared.call("AuthService/GetCurrentUser", {}, signal);
		return openJob(shared, who, id, signal);
	}
	if (at === "sign-up") return openSignUp(() => go("/jobs"));
	if (at === "sign-in") return openSignIn(() => go("/jobs"));
	if (!signedIn()) return openSignIn(() => open(true));
	const who = await whoAmI();
	if (at === "jobs" && id) return openJob(client(), who, id, signal);
	if (at === "keys") return openKeys();
	if (at === "profile") return openProfile();
	return openJobs(client(), who, parameters, error => {
		close?.();
		close = null;
		failed(error, null, [at, id]);
	});
}

function failed(error, token, [at, id]) {
	if (error.ended && !token) {
		forget();
		showNavigation(at, false);
		return openSignIn(() => open(true), "You are signed out: the session or key has ended.");
	}
	if (error.passing) {
		lone("No connection", [error.message, "Nothing is lost. The page tries again."]);
		const again = setTimeout(() => open(false), pauseMs(failures++, error));
		close = () => clearTimeout(again);
		return;
	}
	// One text whatever the cause, since the service tells none.
	if (token)
		return lone("This link is not valid", [
			"It may have expired, been ended by whoever made it, or been copied only in part. Ask them for a new one.",
			"The job itself is not affected.",
		]);
	if (at === "jobs" && id) return lone("No such job", ["There is no job at this address, or it is not yours to see."]);
	if (!error.code) console.error(error);
	return lone("This did not work", [error.message]);
}

function lone(head, lines) {
	const text = lines.map(line => h("p", line));
	main.replaceChildren(h("section", { id: "lone" }, h("h1", head), text));
	document.title = `${head} – milepost`;
}

function showNavigation(at = "jobs", shown, token) {
	$("#nav").hidden = $("#out").hidden = !shown;
	// A shared link leads nowhere else, and its reader would lose the token.
	setAttribute($(".brand"), "href", token ? null : "#/jobs");
	for (const each of $$("#nav a")) setAttribute(each, "aria-current", each.hash === `#/${at}` ? "page" : null);
}

async function signOut() {
	// A key is only forgotten: it goes on to serve whoever else has it.
	await client()
		.call("AuthService/LogOut")
		.catch(() => {});
	forget();
	go("/sign-in");
	open(true);
}

document.body.classList.toggle("embed", new URLSearchParams(location.search).has("embed"));
paint(attempt(() => localStorage.getItem(THEME)) ?? "auto");
$("#theme").addEventListener("click", changeTheme);
$("#out").addEventListener("click", signOut);
// Not by fragment, which is the address of the view and has the token of a link.
$("#skip").addEventListener("click", event => {
	event.preventDefault();
	main.focus();
});
setText($("#zone"), `Times are this device’s: ${Intl.DateTimeFormat().resolvedOptions().timeZone}.`);
addEventListener("hashchange", () => open(true));
open(false);

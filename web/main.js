// Starts the page: the colours, and the view that the address asks for.

import { openProfile, openSignIn, openSignUp } from "./account.js";
import { Client } from "./api.js";
import { $, $$, h, icon, setAttribute, setText, template } from "./dom.js";
import { openJob } from "./job.js";
import { openJobs } from "./jobs.js";
import { openKeys } from "./keys.js";
import { go, route } from "./router.js";
import { client, forget, signedIn, whoAmI } from "./session.js";

const main = $("#main");
const THEME = "milepost.theme",
	NEXT = { auto: "light", light: "dark", dark: "auto" };
let close = null,
	opening = null;

function paint(theme) {
	document.documentElement.dataset.theme = theme;
	const button = $("#theme");
	button.replaceChildren(icon(theme));
	button.ariaLabel = `Colours: ${theme === "auto" ? "as the system" : theme}. Change`;
}

function storedTheme() {
	try {
		return localStorage.getItem(THEME) ?? "auto";
	} catch {
		return "auto";
	}
}

function changeTheme() {
	const theme = NEXT[document.documentElement.dataset.theme];
	paint(theme);
	try {
		localStorage.setItem(THEME, theme);
	} catch {
		// Without storage the choice lasts as long as the document.
	}
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
	} catch (error) {
		if (signal.aborted) return;
		failed(error, token, path);
	}
	if (focus) main.focus({ preventScroll: true });
	if (focus) scrollTo(0, 0);
}

async function view(path, token, parameters, signal) {
	// The token of a link wins over the session of the tab: it shows one job, and what it may see of it.
	if (token && path[0] === "jobs" && path[1]) {
		const shared = new Client(token);
		const who = await shared.call("AuthService/GetCurrentUser", {}, signal);
		return openJob(main, shared, who, path[1], signal);
	}
	if (path[0] === "sign-up") return openSignUp(main, () => go("/jobs"));
	if (path[0] === "sign-in") return openSignIn(main, () => go("/jobs"));
	if (!signedIn()) return openSignIn(main, () => open(true));
	const who = await whoAmI();
	if (path[0] === "jobs" && path[1]) return openJob(main, client(), who, path[1], signal);
	if (path[0] === "keys") return openKeys(main);
	if (path[0] === "profile") return openProfile(main);
	return openJobs(main, client(), who, parameters, error => {
		close?.();
		close = null;
		failed(error, null, path);
	});
}

function failed(error, token, path) {
	if (error.ended && !token) {
		forget();
		showNavigation(path[0], false);
		return openSignIn(main, () => open(true), "You are signed out: the session or key has ended.");
	}
	if (error.passing) {
		lone("No connection", [error.message, "Nothing is lost. The page tries again."]);
		const again = setTimeout(() => open(false), Math.max(error.retryMs, 3000));
		close = () => clearTimeout(again);
		return;
	}
	// One text whatever the cause, since the service tells none.
	if (token)
		return lone("This link is not valid", [
			"It may have expired, been ended by whoever made it, or been copied only in part. Ask them for a new one.",
			"The job itself is not affected.",
		]);
	if (path[0] === "jobs" && path[1])
		return lone("No such job", ["There is no job at this address, or it is not yours to see."]);
	if (!error.code) console.error(error);
	return lone("This did not work", [error.message]);
}

function lone(head, lines) {
	main.replaceChildren(template("t-lone"));
	setText($("h1", main), head);
	$("#lone", main).append(...lines.map(line => h("p", {}, line)));
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
paint(storedTheme());
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

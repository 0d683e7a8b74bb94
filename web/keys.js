// The API keys of a user: made, replaced and ended.

import { now } from "./api.js";
import { $, $$, h, reveal, setText, template } from "./dom.js";
import { submit } from "./form.js";
import { client, mayManageKeys, whoAmI } from "./session.js";
import { day, plain, plural, time, when } from "./words.js";

const DAY_MS = 86_400_000;

export async function openKeys(main) {
	const who = await whoAmI();
	main.replaceChildren(template("t-keys"));
	document.title = "API keys – milepost";
	const form = $("#key-f", main),
		keys = new Map();
	let pageToken = "";
	// A customer's key cannot append.
	if (who.user.role !== "USER_ROLE_PROVIDER") $("[value=API_KEY_SCOPE_APPEND]", form).closest("label").remove();
	if (!mayManageKeys(who)) {
		for (const element of form.elements) element.disabled = true;
		return setText($("#keys-n", main), "This key may not manage keys.");
	}
	submit(form, async () => {
		const life = Number(form.elements.life.value),
			scopes = $$("[name=scope]:checked", form).map(box => box.value);
		if (!scopes.length) throw new Error("A key needs something that it may do.");
		const { apiKey, secret } = await client().call("AuthService/CreateApiKey", {
			note: form.elements.note.value,
			scopes,
			...(life && { expiresAt: new Date(now() + life * DAY_MS).toISOString() }),
		});
		form.elements.note.value = "";
		show([apiKey]);
		reveal(main, secret);
	});
	$("#more", main).addEventListener("click", () => list().catch(failed));

	async function list() {
		const page = await client().call("AuthService/ListApiKeys", { pageSize: 100, pageToken });
		pageToken = page.nextPageToken ?? "";
		show(page.apiKeys ?? []);
		$("#more", main).hidden = !pageToken;
	}

	function show(changed) {
		for (const key of changed) keys.set(key.id, key);
		$("#keys", main).replaceChildren(...[...keys.values()].map(row));
		$("table", main).hidden = !keys.size;
		setText($("#keys-n", main), keys.size ? `${plural(keys.size, "key")}, oldest first` : "There is none yet.");
	}

	function row(key) {
		const expires = time(key.expiresAt),
			revoked = time(key.revokedAt),
			used = time(key.lastUsedAt),
			label = `${key.keyPrefix}…`;
		const ended = revoked ?? (expires <= now() ? expires : undefined);
		const scopes = (key.scopes ?? []).map(scope => plain("API_KEY_SCOPE_", scope)).join(", ");
		return h(
			ended ? "tr.past" : "tr",
			{ "data-key": key.id },
			h("td.wide", {}, h("span.mono", {}, label), h("small", {}, h("bdi", {}, key.note ?? ""))),
			h("td", { "data-l": "May" }, scopes),
			h("td", { "data-l": "Expires" }, ended ? `${when(ended)} (ended)` : expires ? day(expires) : "never"),
			h("td", { "data-l": "Last used" }, used ? when(used) : "not yet"),
			h("td", { "data-l": "Made" }, day(time(key.createdAt))),
			h(
				"td.wide",
				{},
				!ended && [
					h(
						"button.quiet",
						{
							type: "button",
							"aria-label": `Rotate ${label}`,
							title: "A new key takes its place; the old one stays valid for an hour",
							click: event => act(event, rotate, key),
						},
						"Rotate",
					),
					" ",
					h("button", { type: "button", "aria-label": `End ${label}`, click: event => act(event, end, key) }, "End"),
				],
			),
		);
	}

	async function rotate(key) {
		const { apiKey, secret, oldApiKey } = await client().call("AuthService/RotateApiKey", { apiKeyId: key.id });
		show([oldApiKey, apiKey]);
		reveal(main, secret);
	}

	async function end(key) {
		const { apiKey } = await client().call("AuthService/ExpireApiKey", { apiKeyId: key.id });
		show([apiKey]);
		$("#keys-h", main).focus();
	}

	function act(event, what, key) {
		event.currentTarget.disabled = true;
		what(key).catch(failed);
	}

	function failed(error) {
		setText($("#keys-n", main), error.message);
	}

	await list();
}

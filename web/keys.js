// The API keys of a user: made, replaced and ended.

import { now } from "./api.js";
import { $, $$, h, reveal, setText, show } from "./dom.js";
import { submit } from "./form.js";
import { client, may, whoAmI } from "./session.js";
import { day, plain, plural, time, when } from "./words.js";

const DAY_MS = 86_400_000;

export async function openKeys() {
	const who = await whoAmI();
	show("t-keys", "API keys");
	const form = $("#key-f"),
		keys = new Map();
	let pageToken = "";
	if (!may(who, "MANAGE")) {
		for (const element of form.elements) element.disabled = true;
		return setText($("#keys-n"), "This key may not manage keys.");
	}
	submit(form, async ({ life: { value: life }, note }) => {
		const scopes = $$("[name=scope]:checked", form).map(box => box.value);
		if (!scopes.length) throw new Error("A key needs something that it may do.");
		const { apiKey, secret } = await client().call("AuthService/CreateApiKey", {
			note: note.value,
			scopes,
			...(life && { expiresAt: new Date(now() + life * DAY_MS).toISOString() }),
		});
		note.value = "";
		put([apiKey]);
		reveal(form, "The new key’s secret.", secret);
	});
	$("#more").addEventListener("click", () => list().catch(failed));

	async function list() {
		const page = await client().call("AuthService/ListApiKeys", { pageSize: 100, pageToken });
		pageToken = page.nextPageToken ?? "";
		put(page.apiKeys ?? []);
		$("#more").hidden = !pageToken;
	}

	function put(changed) {
		for (const key of changed) keys.set(key.id, key);
		$("#keys").replaceChildren(...[...keys.values()].map(row));
		$("table").hidden = !keys.size;
		setText($("#keys-n"), keys.size ? `${plural(keys.size, "key")}, oldest first` : "There is none yet.");
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
			h("td.wide", h("span.mono", label), h("small", h("bdi", key.note ?? ""))),
			h("td", { "data-l": "May" }, scopes),
			h("td", { "data-l": "Expires" }, ended ? `${when(ended)} (ended)` : expires ? day(expires) : "never"),
			h("td", { "data-l": "Last used" }, used ? when(used) : "not yet"),
			h("td", { "data-l": "Made" }, day(time(key.createdAt))),
			h(
				"td.wide",
				!ended && [
					h(
						"button.quiet",
						{
							"aria-label": `Rotate ${label}`,
							title: "A new key takes its place; the old one stays valid for an hour",
							click: event => act(event, rotate, key),
						},
						"Rotate",
					),
					" ",
					h("button", { "aria-label": `End ${label}`, click: event => act(event, end, key) }, "End"),
				],
			),
		);
	}

	async function rotate(key) {
		const { apiKey, secret, oldApiKey } = await client().call("AuthService/RotateApiKey", { apiKeyId: key.id });
		put([oldApiKey, apiKey]);
		reveal(form, "The new key’s secret.", secret);
	}

	async function end(key) {
		const { apiKey } = await client().call("AuthService/ExpireApiKey", { apiKeyId: key.id });
		put([apiKey]);
		$("#keys-h").focus();
	}

	function act(event, what, key) {
		event.currentTarget.disabled = true;
		what(key).catch(failed);
	}

	function failed(error) {
		setText($("#keys-n"), error.message);
	}

	await list();
}

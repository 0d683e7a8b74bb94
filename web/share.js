// The links to a job: each is a watch token in the fragment of an address, which no server and no log ever sees.

import { now } from "./api.js";
import { $, h, openDialog, reveal, setText } from "./dom.js";
import { submit } from "./form.js";
import { time, when } from "./words.js";

export function openShare(client, jobId) {
	const dialog = openDialog("t-share"),
		form = $("#share-f", dialog);
	submit(form, async ({ note, lifetime }) => {
		const { secret } = await client.call("AuthService/CreateWatchToken", {
			jobId,
			note: note.value,
			lifetime: `${lifetime.value}s`,
		});
		note.value = "";
		await list();
		reveal(form, "New link.", new URL(`#/jobs/${jobId}?token=${secret}`, document.baseURI).href);
	});

	async function list() {
		const tokens = [];
		let pageToken = "";
		do {
			const page = await client.call("AuthService/ListWatchTokens", { jobId, pageSize: 500, pageToken });
			tokens.push(...(page.watchTokens ?? []));
			pageToken = page.nextPageToken;
		} while (pageToken);
		// Newest first: the one that was just made is at hand.
		$("#links", dialog).replaceChildren(...tokens.reverse().map(item));
		setText($("#links-none", dialog), tokens.length ? "" : "There is none yet.");
	}

	function item(token) {
		const expires = time(token.expiresAt),
			revoked = time(token.revokedAt),
			used = time(token.lastUsedAt),
			open = !revoked && expires > now();
		const label = `${token.secretPrefix}…`;
		const end = async event => {
			event.currentTarget.disabled = true;
			await client.call("AuthService/ExpireWatchToken", { watchTokenId: token.id }).catch(error => {
				// A link that ended meanwhile is what was wished.
				if (error.reason !== "WATCH_TOKEN_ALREADY_EXPIRED") throw error;
			});
			await list();
			$("#share-f", dialog).elements.note.focus();
		};
		return h(
			"li",
			h(
				"div",
				h("span.mono", label),
				" ",
				h("bdi", token.note ?? ""),
				h(
					"p",
					`${open ? "until" : "ended"} ${when(open ? expires : (revoked ?? expires))}, ${used ? `last used ${when(used)}` : "not used yet"}`,
				),
			),
			open && h("button", { "aria-label": `End the link ${label}`, click: event => end(event).catch(failed) }, "End"),
		);
	}

	function failed(error) {
		setText($("#links-none", dialog), error.message);
	}

	list().catch(failed);
}

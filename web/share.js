// The links to a job: each is a watch token in the fragment of an address, which no server and no log ever sees.

import { now } from "./api.js";
import { $, h, reveal, setText, template } from "./dom.js";
import { submit } from "./form.js";
import { time, when } from "./words.js";

export const shareLink = (jobId, secret) => new URL(`#/jobs/${jobId}?token=${secret}`, document.baseURI).href;

export function openShare(client, jobId) {
	document.body.append(template("t-share"));
	const dialog = $("#share-d"),
		form = $("#share-f", dialog);
	dialog.addEventListener("close", () => dialog.remove());
	// A change of the view ends the dialog, too.
	addEventListener("hashchange", () => dialog.remove(), { once: true });
	submit(form, async () => {
		const { secret } = await client.call("AuthService/CreateWatchToken", {
			jobId,
			note: form.elements.note.value,
			lifetime: `${form.elements.lifetime.value}s`,
		});
		form.elements.note.value = "";
		await list();
		reveal(dialog, shareLink(jobId, secret));
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
			{},
			h(
				"div",
				{},
				h("span.mono", {}, label),
				" ",
				h("bdi", {}, token.note ?? ""),
				h(
					"p",
					{},
					`${open ? "until" : "ended"} ${when(open ? expires : (revoked ?? expires))}, ${used ? `last used ${when(used)}` : "not used yet"}`,
				),
			),
			open &&
				h(
					"button",
					{ type: "button", "aria-label": `End the link ${label}`, click: event => end(event).catch(failed) },
					"End",
				),
		);
	}

	function failed(error) {
		setText($("#links-none", dialog), error.message);
	}

	dialog.showModal();
	list().catch(failed);
}

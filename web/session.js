// The credential of this tab. It is in session storage alone: it ends with the tab, and no other tab reads it.

import { Client } from "./api.js";
import { attempt } from "./dom.js";

const KEY = "milepost.secret";
// Frames of other sites may have no storage: then the credential lasts as long as the document.
let memory = null;

const read = () => attempt(() => sessionStorage.getItem(KEY)) ?? memory;

function write(secret) {
	memory = secret;
	attempt(() => (secret ? sessionStorage.setItem(KEY, secret) : sessionStorage.removeItem(KEY)));
}

let known = null;

export const signedIn = () => read() !== null;

/** A client with the tab's credential, or without one. */
export const client = () => new Client(read());

/** Who the tab's credential belongs to, as GetCurrentUser answers; asked once. */
export async function whoAmI() {
	const secret = read();
	if (known?.secret !== secret) known = { secret, answer: await client().call("AuthService/GetCurrentUser") };
	return known.answer;
}

export function keep(secret) {
	known = null;
	write(secret);
}

/** Forgets the credential. */
export const forget = () => keep(null);

/** Whether the credential may do what a scope stands for: a session may do everything. */
export const may = (who, scope) => Boolean(who.session ?? who.apiKey?.scopes?.includes(`API_KEY_SCOPE_${scope}`));

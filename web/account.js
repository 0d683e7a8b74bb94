// Signing in, signing up, a pasted secret, and the profile.

import { Client } from "./api.js";
import { $, fact, h, setText, show } from "./dom.js";
import { done, submit } from "./form.js";
import { go } from "./router.js";
import { client, keep, whoAmI } from "./session.js";
import { fullName, time, when } from "./words.js";

/** Shows the sign-in; `then` is called with a valid credential. `why` says what brought the reader here. */
export function openSignIn(then, why) {
	show("t-sign-in", "Sign in");
	$("#why").hidden = !why;
	setText($("#why"), why ?? "");
	submit($("#sign-in-f"), async ({ email, password }) => {
		const { session } = await new Client().call("AuthService/LogIn", { email: email.value, password: password.value });
		keep(session.secret);
		then();
	});
	submit($("#paste-f"), async elements => {
		const secret = elements.secret.value.trim();
		const who = await new Client(secret).call("AuthService/GetCurrentUser").catch(error => {
			throw error.ended
				? new Error("This key or token is not valid. It may have expired, been ended, or been copied only in part.")
				: error;
		});
		if (who.watchToken) return go(`/jobs/${who.watchToken.jobId}`, { token: secret });
		keep(secret);
		then();
	});
}

export function openSignUp(then) {
	show("t-sign-up", "Sign up");
	submit($("#sign-up-f"), async ({ role, email, password, first_name, last_name }) => {
		const { session } = await new Client().call("AuthService/SignUp", {
			role: role.value,
			email: email.value,
			password: password.value,
			firstName: first_name.value,
			lastName: last_name.value,
		});
		keep(session.secret);
		then();
	});
}

export async function openProfile() {
	const who = await whoAmI();
	show("t-profile", "Profile");
	const { user } = who,
		until = time((who.session ?? who.apiKey)?.expiresAt);
	$("#meta").append(
		fact("E-mail", h("bdi", user.email)),
		fact("Role", user.role === "USER_ROLE_PROVIDER" ? "provider" : "customer"),
		fact("Id", h("span.mono", user.id)),
		fact(who.session ? "Signed in until" : "Key good until", until ? when(until) : "it is ended"),
	);
	const code = $("#code-f");
	const showCode = ({ customerCode = "" }) => {
		code.hidden = !customerCode;
		setText($("#code"), customerCode.replace(/^.{5}/, "$&-"));
	};
	showCode(user);
	const names = $("#names-f"),
		{ first_name, last_name } = names.elements;
	first_name.value = user.firstName ?? "";
	last_name.value = user.lastName ?? "";
	const password = $("#password-f");
	if (!who.session) {
		for (const form of [code, names, password]) for (const element of form.elements) element.disabled = true;
		password.append(h("p", "Only a session changes these: sign in with e-mail and password."));
	}
	submit(code, async () => {
		const { user } = await client().call("AuthService/RenewCustomerCode");
		who.user = user;
		showCode(user);
		done(code, "The old code works no more.");
	});
	submit(names, async () => {
		const { user } = await client().call("AuthService/UpdateCurrentUser", {
			user: { firstName: first_name.value, lastName: last_name.value },
			updateMask: "firstName,lastName",
		});
		who.user = user;
		done(names, `Saved${fullName(user) ? `: ${fullName(user)}` : ""}.`);
	});
	submit(password, async ({ current_password, new_password }) => {
		const { endedSessions = 0, validApiKeys = 0 } = await client().call("AuthService/ChangePassword", {
			currentPassword: current_password.value,
			newPassword: new_password.value,
		});
		password.reset();
		done(password, `Changed. Other sessions ended: ${endedSessions}. API keys that stay valid: ${validApiKeys}.`);
	});
}

// Signing in, signing up, a pasted secret, and the profile.

import { Client } from "./api.js";
import { $, h, setText, template } from "./dom.js";
import { done, submit } from "./form.js";
import { go } from "./router.js";
import { client, keep, whoAmI } from "./session.js";
import { fullName, time, when } from "./words.js";

/** Shows the sign-in; `then` is called with a valid credential. `why` says what brought the reader here. */
export function openSignIn(main, then, why) {
	main.replaceChildren(template("t-sign-in"));
	document.title = "Sign in – milepost";
	if (why) {
		$("#why", main).hidden = false;
		setText($("#why", main), why);
	}
	const form = $("#sign-in-f", main),
		{ email, password } = form.elements;
	submit(form, async () => {
		const { session } = await new Client().call("AuthService/LogIn", { email: email.value, password: password.value });
		keep(session.secret);
		then();
	});
	const paste = $("#paste-f", main);
	submit(paste, async () => {
		const secret = paste.elements.secret.value.trim();
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

export function openSignUp(main, then) {
	main.replaceChildren(template("t-sign-up"));
	document.title = "Sign up – milepost";
	const form = $("#sign-up-f", main),
		{ role, email, password, first_name, last_name } = form.elements;
	submit(form, async () => {
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

export async function openProfile(main) {
	const who = await whoAmI();
	main.replaceChildren(template("t-profile"));
	document.title = "Profile – milepost";
	const { user } = who,
		until = time((who.session ?? who.apiKey)?.expiresAt);
	const fact = (name, value) => h("div", {}, h("dt", {}, name), h("dd", {}, value));
	$("#meta", main).append(
		fact("E-mail", h("bdi", {}, user.email)),
		fact("Role", user.role === "USER_ROLE_PROVIDER" ? "provider" : "customer"),
		fact("Id", h("span.mono", {}, user.id)),
		fact(who.session ? "Signed in until" : "Key good until", until ? when(until) : "it is ended"),
	);
	const names = $("#names-f", main),
		{ first_name, last_name } = names.elements;
	first_name.value = user.firstName ?? "";
	last_name.value = user.lastName ?? "";
	const password = $("#password-f", main),
		{ current_password, new_password } = password.elements;
	if (!who.session) {
		for (const form of [names, password]) for (const element of form.elements) element.disabled = true;
		password.append(h("p", {}, "Only a session changes these: sign in with e-mail and password."));
	}
	submit(names, async () => {
		const { user } = await client().call("AuthService/UpdateCurrentUser", {
			user: { firstName: first_name.value, lastName: last_name.value },
			updateMask: "firstName,lastName",
		});
		who.user = user;
		done(names, `Saved${fullName(user) ? `: ${fullName(user)}` : ""}.`);
	});
	submit(password, async () => {
		const { endedSessions = 0, validApiKeys = 0 } = await client().call("AuthService/ChangePassword", {
			currentPassword: current_password.value,
			newPassword: new_password.value,
		});
		password.reset();
		done(password, `Changed. Other sessions ended: ${endedSessions}. API keys that stay valid: ${validApiKeys}.`);
	});
}

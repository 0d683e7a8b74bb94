// The addresses of the page: each is a fragment, `#/jobs/ID?token=…`. Nothing else within the page links by fragment.

/** The path and the parameters of the present address. */
export function route() {
	const [path, query = ""] = location.hash.replace(/^#/, "").split(/\?(.*)/s);
	return { path: path.split("/").filter(Boolean), parameters: new URLSearchParams(query) };
}

const address = (path, parameters = {}) => {
	const query = new URLSearchParams(parameters).toString();
	return `#${path}${query && `?${query}`}`;
};

export function go(path, parameters) {
	location.hash = address(path, parameters);
}

/** Changes the address of the view that is shown, so that it can be copied and loaded again. */
export function note(path, parameters) {
	history.replaceState(null, "", address(path, parameters));
}

/** The address of a job, for links. */
export const jobAddress = id => address(`/jobs/${id}`);

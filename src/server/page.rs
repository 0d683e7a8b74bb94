//! The page for people: the files of `web/`, which are a part of the binary. They are no calls,
//! and need no credential; what they show they get by calls.

use std::{
    convert::Infallible,
    future::ready,
    sync::Arc,
    task::{Context, Poll},
};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use http::{
    HeaderName, HeaderValue, Method, Request, Response, StatusCode,
    header::{
        CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, ETAG, IF_NONE_MATCH, REFERRER_POLICY,
        X_CONTENT_TYPE_OPTIONS,
    },
};
use http_body_util::Full;
use sha2::{Digest as _, Sha256};
use tonic::body::Body;
use tower::Service;

use super::Answering;
use crate::error::{Error, Result};

macro_rules! files {
    ($($name:literal)*) => {
        [$(($name, include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/web/", $name)).as_slice())),*]
    };
}

/// The document, which is served at `/`.
const DOCUMENT: &str = "index.html";
static FILES: [(&str, &[u8]); 23] = files!(
    "account.js" "api.js" "connection.js" "dom.js" "download.js" "events.js" "form.js" "icon.svg" "index.html"
    "job.js" "jobs.js" "keys.js" "list.js" "log.js" "main.js" "month.js" "router.js" "session.js" "share.js"
    "steps.js" "style.css" "watch.js" "words.js"
);

/// What the document may load, and who may show it in a frame is added.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; \
                      base-uri 'none'; form-action 'none'; require-trusted-types-for 'script'; trusted-types 'none'; \
                      frame-ancestors ";

/// Serves the page, and passes all other requests on.
#[derive(Clone, Debug)]
pub(super) struct Page<S> {
    services: S,
    policy: HeaderValue,
    files: Arc<[File]>,
}

#[derive(Debug)]
struct File {
    path: String,
    kind: &'static str,
    content: &'static [u8],
    tag: HeaderValue,
}

impl<S> Page<S> {
    /// The page may be shown in frames of the pages of these origins.
    pub(super) fn new(services: S, frame_ancestors: &[String]) -> Result<Self> {
        let ancestors =
            if frame_ancestors.is_empty() { "'none'".to_owned() } else { frame_ancestors.join(" ") };
        let policy = HeaderValue::try_from(format!("{POLICY}{ancestors}")).map_err(Error::internal)?;
        let files = FILES.iter().map(|&(name, content)| File::new(name, content));
        Ok(Self { services, policy, files: files.collect::<Result<_>>()? })
    }

    fn answer(&self, request: &Request<Body>) -> Option<Response<Body>> {
        if !matches!(*request.method(), Method::GET | Method::HEAD) {
            return None;
        }
        let file = self.files.iter().find(|file| file.path == request.uri().path())?;
        let mut response = Response::new(Body::empty());
        let headers = response.headers_mut();
        let mut set = |name: HeaderName, value| headers.insert(name, HeaderValue::from_static(value));
        set(CONTENT_TYPE, file.kind);
        set(X_CONTENT_TYPE_OPTIONS, "nosniff");
        if file.path == "/" {
            set(CACHE_CONTROL, "no-store");
            set(REFERRER_POLICY, "no-referrer");
            headers.insert(CONTENT_SECURITY_POLICY, self.policy.clone());
        } else {
            // Asked for anew at each load, so that no page has modules of two versions.
            set(CACHE_CONTROL, "no-cache");
            headers.insert(ETAG, file.tag.clone());
        }
        if file.path != "/" && request.headers().get(IF_NONE_MATCH) == Some(&file.tag) {
            *response.status_mut() = StatusCode::NOT_MODIFIED;
        } else {
            // hyper leaves the body of an answer to HEAD out.
            *response.body_mut() = Body::new(Full::from(file.content));
        }
        Some(response)
    }
}

impl File {
    fn new(name: &str, content: &'static [u8]) -> Result<Self> {
        let kind = match name.rsplit_once('.') {
            Some((_, "html")) => "text/html; charset=utf-8",
            Some((_, "js")) => "text/javascript; charset=utf-8",
            Some((_, "css")) => "text/css; charset=utf-8",
            Some((_, "svg")) => "image/svg+xml",
            _ => return Err(Error::internal(format!("web/{name} is of an unknown type"))),
        };
        let path = if name == DOCUMENT { "/".to_owned() } else { format!("/{name}") };
        let tag = format!("\"{}\"", URL_SAFE_NO_PAD.encode(Sha256::digest(content)));
        Ok(Self { path, kind, content, tag: HeaderValue::try_from(tag).map_err(Error::internal)? })
    }
}

impl<S> Service<Request<Body>> for Page<S>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible, Future = Answering>,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Answering;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.services.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Body>) -> Answering {
        match self.answer(&request) {
            Some(response) => Box::pin(ready(Ok(response))),
            None => self.services.call(request),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, fs};

    use super::*;

    #[test]
    fn every_file_of_the_page_is_in_the_binary_and_the_page_is_below_132_kb() {
        let folder = fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/web")).expect("the folder");
        let on_disk: BTreeSet<String> =
            folder.map(|entry| entry.expect("an entry").file_name().into_string().expect("a name")).collect();
        let embedded: BTreeSet<String> = FILES.iter().map(|(name, _)| (*name).to_owned()).collect();
        assert_eq!(on_disk, embedded);
        assert!(FILES.iter().map(|(_, content)| content.len()).sum::<usize>() < 132_000);
    }
}

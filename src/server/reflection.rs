//! Server reflection, with a budget of bytes for each caller.
//!
//! A request of 30 bytes is answered with up to 24 kB of descriptors, without a
//! credential, and any number of times. So the bytes of the answers are counted: for the
//! stream, and for the user of the call's credential or else the client's address, whose
//! budget fills up again with time. A stream that exceeds one of both ends with
//! RESOURCE_EXHAUSTED.

use std::{
    convert::Infallible,
    future::Future,
    net::IpAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};

use bytes::Bytes;
use http::{Extensions, HeaderMap, HeaderValue, Request, Response};
use http_body::Frame;
use moka::sync::Cache;
use parking_lot::Mutex;
use tonic::{Status, body::Body, server::NamedService};
use tower::Service;
use uuid::Uuid;

use crate::{
    error::{Error, Result},
    limits::{REFLECTION_BYTES, REFLECTION_BYTES_PER_SECOND, REFLECTION_STREAM_BYTES},
    models::{caller::Subject, log_in_throttle::network},
    services::App,
};

/// Most callers whose budgets are remembered; the budget of one that is forgotten is full.
const CALLERS: u64 = 65_536;

/// For whom the bytes are counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Payer {
    User(Uuid),
    /// None: the address is not known.
    Network(Option<IpAddr>),
}

/// The budgets of all callers, shared by both versions of the protocol.
#[derive(Clone, Debug)]
pub(super) struct Budgets(Cache<Payer, Arc<Mutex<Budget>>>);

impl Budgets {
    pub(super) fn new() -> Self {
        // A budget that was not used for so long is full, as a new one is.
        let refill = Duration::from_secs((REFLECTION_BYTES / REFLECTION_BYTES_PER_SECOND) as u64);
        Self(Cache::builder().max_capacity(CALLERS).time_to_idle(refill).build())
    }

    fn of(&self, payer: Payer) -> Arc<Mutex<Budget>> {
        self.0.get_with(payer, || Arc::new(Mutex::new(Budget::full(Instant::now()))))
    }
}

/// The bytes that may be sent to one caller.
#[derive(Debug)]
struct Budget {
    left: f64,
    at: Instant,
}

impl Budget {
    fn full(now: Instant) -> Self {
        Self { left: REFLECTION_BYTES as f64, at: now }
    }

    /// Takes the bytes of a message, all or none. Fails with [`Error::Overloaded`].
    fn spend(&mut self, bytes: usize, now: Instant) -> Result<()> {
        let rate = REFLECTION_BYTES_PER_SECOND as f64;
        let gained = now.saturating_duration_since(self.at).as_secs_f64() * rate;
        self.left = (self.left + gained).min(REFLECTION_BYTES as f64);
        self.at = now;
        let missing = bytes as f64 - self.left;
        if missing > 0.0 {
            let retry_after = Duration::from_secs_f64((missing / rate).ceil());
            return Err(Error::Overloaded { what: "bytes of reflection", retry_after });
        }
        self.left -= bytes as f64;
        Ok(())
    }
}

/// A reflection service whose answers are paid from the budget of their caller.
#[derive(Clone, Debug)]
pub(super) struct Budgeted<S> {
    service: S,
    app: App,
    budgets: Budgets,
}

impl<S> Budgeted<S> {
    pub(super) fn new(service: S, app: App, budgets: Budgets) -> Self {
        Self { service, app, budgets }
    }
}

impl<S: NamedService> NamedService for Budgeted<S> {
    const NAME: &'static str = S::NAME;
}

impl<S> Service<Request<Body>> for Budgeted<S>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible> + Clone + Send + 'static,
    S::Future: Send + 'static,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.service.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let Self { mut service, app, budgets } = self.clone();
        Box::pin(async move {
            let budget = budgets.of(payer(&app, request.extensions(), request.headers()).await);
            let response = service.call(request).await?;
            Ok(response.map(|inner| Body::new(Paid { inner, left: REFLECTION_STREAM_BYTES, budget })))
        })
    }
}

/// A credential that is not valid is as none: clients send it with their reflection too,
/// and learn from the call itself that it is refused.
async fn payer(app: &App, extensions: &Extensions, headers: &HeaderMap) -> Payer {
    let address = app.address_of(extensions, headers).map(network);
    match app.authenticate(headers).await.map(|credential| credential.caller().subject()) {
        Ok(Subject::User { id, .. }) => Payer::User(id),
        Ok(Subject::Job(_)) | Err(_) => Payer::Network(address),
    }
}

/// An answer that ends once its own bytes or those of its budget are used up.
struct Paid {
    inner: Body,
    left: usize,
    budget: Arc<Mutex<Budget>>,
}

impl Paid {
    fn spend(&mut self, bytes: usize) -> Result<()> {
        // A new stream has more at once.
        let of_stream = self.left.checked_sub(bytes).ok_or(Error::Overloaded {
            what: "bytes of reflection in a stream",
            retry_after: Duration::from_secs(1),
        });
        self.left = of_stream?;
        self.budget.lock().spend(bytes, Instant::now())
    }
}

impl http_body::Body for Paid {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let paid = self.get_mut();
        let frame = ready!(Pin::new(&mut paid.inner).poll_frame(cx));
        let bytes = frame.as_ref().and_then(|frame| frame.as_ref().ok()?.data_ref()).map_or(0, Bytes::len);
        let Err(refused) = paid.spend(bytes) else { return Poll::Ready(frame) };
        paid.inner = Body::empty();
        let mut trailers = HeaderMap::new();
        if Status::from(refused).add_header(&mut trailers).is_err() {
            trailers.insert("grpc-status", HeaderValue::from_static("8"));
        }
        Poll::Ready(Some(Ok(Frame::trailers(trailers))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_budget_fills_up_again_with_time_and_refuses_more_than_it_has() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut budget = Budget::full(start);
        assert!(budget.spend(REFLECTION_BYTES, at(0)).is_ok());
        let refused = budget.spend(REFLECTION_BYTES_PER_SECOND + 1, at(0));
        let Err(Error::Overloaded { retry_after, .. }) = refused else { panic!("{refused:?}") };
        assert_eq!(retry_after, Duration::from_secs(2));
        assert!(budget.spend(REFLECTION_BYTES_PER_SECOND + 1, at(1)).is_err());
        assert!(budget.spend(REFLECTION_BYTES_PER_SECOND + 1, at(2)).is_ok());
        assert!(budget.spend(REFLECTION_BYTES + 1, at(1_000_000)).is_err(), "no more than a full budget");
        assert!(budget.spend(REFLECTION_BYTES, at(1_000_000)).is_ok());
    }
}

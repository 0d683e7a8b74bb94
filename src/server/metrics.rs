//! Where Prometheus asks: `GET /metrics` over HTTP/1.1, on a listener of its own,
//! so that neither calls nor the drain are in its way. It asks nobody but this
//! process, and so answers while the database is away.

use std::{convert::Infallible, sync::Arc, time::Duration};

use http::{Method, Request, Response, StatusCode, header::CONTENT_TYPE};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use tokio::{net::TcpListener, sync::Semaphore, time};
use tokio_util::sync::CancellationToken;

use crate::{services::App, telemetry::metrics};

/// Longest that one scrape may take, from its connection on: silent clients and
/// slow ones are cut then.
const SCRAPE: Duration = Duration::from_secs(10);
/// Most scrapes at once; more wait.
const SCRAPES: usize = 16;
/// Pause after a connection that could not be accepted, for want of files most
/// likely.
const PAUSE: Duration = Duration::from_millis(100);

/// Serves the metrics of a server for as long as this is polled.
pub async fn serve_metrics(listener: TcpListener, app: App) -> Infallible {
    let turns = Arc::new(Semaphore::new(SCRAPES));
    let ended = CancellationToken::new();
    let _end = ended.clone().drop_guard();
    loop {
        // Nobody closes it.
        let turn = Arc::clone(&turns).acquire_owned().await;
        let Ok((stream, _)) = listener.accept().await else {
            time::sleep(PAUSE).await;
            continue;
        };
        let app = app.clone();
        tokio::spawn(ended.clone().run_until_cancelled_owned(async move {
            let _turn = turn;
            let service = service_fn(move |request| std::future::ready(answer(&app, &request)));
            // One request a connection: what bounds the one bounds the other.
            let scrape =
                http1::Builder::new().keep_alive(false).serve_connection(TokioIo::new(stream), service);
            // Whoever asked has gone, or asked nothing sensible.
            let _unread = time::timeout(SCRAPE, scrape).await;
        }));
    }
}

fn answer(app: &App, request: &Request<Incoming>) -> http::Result<Response<String>> {
    let response = Response::builder();
    match (request.method(), request.uri().path()) {
        (&Method::GET, "/metrics") => {
            response.header(CONTENT_TYPE, metrics::CONTENT_TYPE).body(app.measure())
        }
        _ => response.status(StatusCode::NOT_FOUND).body("metrics are at /metrics\n".to_owned()),
    }
}

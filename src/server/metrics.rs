//! Serves `GET /metrics` (and HEAD) to Prometheus, over HTTP/1.1 on a listener of its own, so that
//! neither calls nor the drain delay a scrape. A scrape reads only this process's
//! memory, and so works during an outage of the database.

use std::{convert::Infallible, time::Duration};

use http::{Method, Request, Response, StatusCode, header::CONTENT_TYPE};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use tokio::{net::TcpListener, task::JoinSet, time};

use crate::{services::App, telemetry::metrics};

/// Longest that a scrape may take from its connection on; silent and slow clients are
/// then cut.
const SCRAPE_TIMEOUT: Duration = Duration::from_secs(10);
/// Most concurrent scrapes; further ones wait.
const MAX_SCRAPES: usize = 16;
/// Pause after a failed accept, most likely for lack of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Serves the metrics of `app` until the future is dropped.
pub async fn serve_metrics(listener: TcpListener, app: App) -> Infallible {
    let mut scrapes = JoinSet::new();
    loop {
        if scrapes.len() >= MAX_SCRAPES {
            scrapes.join_next().await;
        }
        let Ok((stream, _)) = listener.accept().await else {
            time::sleep(ACCEPT_PAUSE).await;
            continue;
        };
        let app = app.clone();
        scrapes.spawn(async move {
            let service = service_fn(move |request| std::future::ready(answer(&app, &request)));
            // One request per connection, so that the limits of scrapes hold for connections.
            let scrape =
                http1::Builder::new().keep_alive(false).serve_connection(TokioIo::new(stream), service);
            // A failure is the client's: it closed the connection or sent no valid request.
            let _failure = time::timeout(SCRAPE_TIMEOUT, scrape).await;
        });
    }
}

fn answer(app: &App, request: &Request<Incoming>) -> http::Result<Response<String>> {
    let response = Response::builder();
    match (request.method(), request.uri().path()) {
        // Of an answer to HEAD, hyper sends the head alone.
        (&Method::GET | &Method::HEAD, "/metrics") => {
            response.header(CONTENT_TYPE, metrics::CONTENT_TYPE).body(app.measure())
        }
        _ => response
            .status(StatusCode::NOT_FOUND)
            .body("not found: the metrics are at GET /metrics\n".to_owned()),
    }
}

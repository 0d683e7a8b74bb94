//! A tonic server of one method with an empty request and response, which does nothing.
//! It shows the minimal cost of a call.

use std::{
    convert::Infallible,
    net::SocketAddr,
    task::{Context, Poll},
};

use futures_util::future::BoxFuture;
use http::uri::PathAndQuery;
use tonic::{
    Request, Response, Status,
    body::Body,
    client::Grpc,
    server::NamedService,
    transport::{Channel, Server},
};
use tonic_prost::ProstCodec;
use tower::service_fn;

use crate::Result;

#[derive(Clone)]
struct Empty;

impl NamedService for Empty {
    const NAME: &'static str = "bench.Empty";
}

impl tower::Service<http::Request<Body>> for Empty {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, std::result::Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<std::result::Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        Box::pin(async move {
            let method = service_fn(async |_: Request<()>| Ok::<_, Status>(Response::new(())));
            let mut grpc = tonic::server::Grpc::new(ProstCodec::<(), ()>::default());
            Ok(grpc.unary(method, request).await)
        })
    }
}

/// Serves until the process is killed.
pub(crate) async fn serve(address: SocketAddr) -> Result<()> {
    Ok(Server::builder().add_service(Empty).serve(address).await?)
}

/// Calls the empty method.
pub(crate) async fn call(grpc: &mut Grpc<Channel>) -> Result<()> {
    grpc.ready().await?;
    let path = PathAndQuery::from_static("/bench.Empty/Call");
    grpc.unary(Request::new(()), path, ProstCodec::<(), ()>::default()).await?;
    Ok(())
}

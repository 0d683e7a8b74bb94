//! The service of the conformance suite, as the comments of its protos say.

use futures_util::{StreamExt as _, stream};
use tonic::{Request, Response, Status, Streaming};

use crate::{
    answers::{self, Answers, add, any, info, unary},
    pb::{
        BidiStreamRequest, BidiStreamResponse, ClientStreamRequest, ClientStreamResponse, ConformancePayload,
        IdempotentUnaryRequest, IdempotentUnaryResponse, ServerStreamRequest, ServerStreamResponse,
        UnaryRequest, UnaryResponse, UnimplementedRequest, UnimplementedResponse,
        conformance_payload::RequestInfo, conformance_service_server::ConformanceService,
    },
};

pub struct Conformance;

#[tonic::async_trait]
impl ConformanceService for Conformance {
    async fn unary(&self, request: Request<UnaryRequest>) -> Result<Response<UnaryResponse>, Status> {
        let info = info(&request, [any("UnaryRequest", request.get_ref())]);
        let answer = |payload| UnaryResponse { payload: Some(payload) };
        unary(request.into_inner().response_definition, info, answer).await
    }

    async fn idempotent_unary(
        &self,
        request: Request<IdempotentUnaryRequest>,
    ) -> Result<Response<IdempotentUnaryResponse>, Status> {
        let info = info(&request, [any("IdempotentUnaryRequest", request.get_ref())]);
        let answer = |payload| IdempotentUnaryResponse { payload: Some(payload) };
        unary(request.into_inner().response_definition, info, answer).await
    }

    async fn unimplemented(
        &self,
        _: Request<UnimplementedRequest>,
    ) -> Result<Response<UnimplementedResponse>, Status> {
        Err(Status::unimplemented("this method is not implemented"))
    }

    type ServerStreamStream = Answers<ServerStreamResponse>;

    async fn server_stream(
        &self,
        request: Request<ServerStreamRequest>,
    ) -> Result<Response<Self::ServerStreamStream>, Status> {
        let info = info(&request, [any("ServerStreamRequest", request.get_ref())]);
        let definition = request.into_inner().response_definition.unwrap_or_default();
        let headers = definition.response_headers.clone();
        let answer = |payload| ServerStreamResponse { payload: Some(payload) };
        let mut response = Response::new(answers::all(definition, Some(info), 0, answer));
        add(response.metadata_mut(), &headers, "");
        Ok(response)
    }

    async fn client_stream(
        &self,
        request: Request<Streaming<ClientStreamRequest>>,
    ) -> Result<Response<ClientStreamResponse>, Status> {
        let mut info = info(&request, []);
        let (mut stream, mut definition) = (request.into_inner(), None);
        while let Some(message) = stream.message().await? {
            info.requests.push(any("ClientStreamRequest", &message));
            if info.requests.len() == 1 {
                definition = message.response_definition;
            }
        }
        unary(definition, info, |payload| ClientStreamResponse { payload: Some(payload) }).await
    }

    type BidiStreamStream = Answers<BidiStreamResponse>;

    async fn bidi_stream(
        &self,
        request: Request<Streaming<BidiStreamRequest>>,
    ) -> Result<Response<Self::BidiStreamStream>, Status> {
        let mut info = info(&request, []);
        let mut stream = request.into_inner();
        let Some(first) = stream.message().await? else {
            return Ok(Response::new(Box::pin(stream::empty())));
        };
        let definition = first.response_definition.clone().unwrap_or_default();
        let headers = definition.response_headers.clone();
        let answers: Self::BidiStreamStream = if first.full_duplex {
            full_duplex(first, stream, info)
        } else {
            info.requests.push(any("BidiStreamRequest", &first));
            while let Some(message) = stream.message().await? {
                info.requests.push(any("BidiStreamRequest", &message));
            }
            answers::all(definition, Some(info), 0, bidirectional)
        };
        let mut response = Response::new(answers);
        add(response.metadata_mut(), &headers, "");
        Ok(response)
    }
}

fn bidirectional(payload: ConformancePayload) -> BidiStreamResponse {
    BidiStreamResponse { payload: Some(payload) }
}

/// Answers each message as it comes, and after the last one what is left to answer.
fn full_duplex(
    first: BidiStreamRequest,
    messages: Streaming<BidiStreamRequest>,
    info: RequestInfo,
) -> Answers<BidiStreamResponse> {
    struct State {
        next: Option<BidiStreamRequest>,
        messages: Streaming<BidiStreamRequest>,
        info: Option<RequestInfo>,
        answered: usize,
        over: bool,
    }
    let definition = first.response_definition.clone().unwrap_or_default();
    let state = State { next: Some(first), messages, info: Some(info), answered: 0, over: false };
    let parts = stream::unfold(state, move |mut state| {
        let definition = definition.clone();
        async move {
            if state.over {
                return None;
            }
            let received = match state.next.take() {
                Some(message) => Ok(Some(message)),
                None => state.messages.message().await,
            };
            let message = match received {
                Ok(message) => message.map(|message| any("BidiStreamRequest", &message)),
                Err(status) => {
                    state.over = true;
                    let failed: Answers<_> = Box::pin(stream::iter([Err(status)]));
                    return Some((failed, state));
                }
            };
            let mut info = state.info.take();
            let more = state.answered < definition.response_data.len();
            if let (Some(message), true) = (&message, more) {
                info.get_or_insert_default().requests = vec![message.clone()];
                state.answered += 1;
                let one = answers::one(&definition, state.answered - 1, info, bidirectional);
                let one: Answers<_> = Box::pin(stream::once(one));
                return Some((one, state));
            }
            state.over = true;
            if let (Some(info), Some(message)) = (&mut info, message) {
                info.requests = vec![message];
            }
            Some((answers::all(definition, info, state.answered, bidirectional), state))
        }
    });
    Box::pin(parts.flatten())
}

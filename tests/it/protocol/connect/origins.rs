//! Pages of other origins.

use http::{Method, Version};

use crate::support::connect_client::{Answer, VERSIONS, call, post, request};
use crate::support::{ALLOWED_ORIGIN, TestServer};

const PATH: &str = "/milepost.v1.AuthService/GetCurrentUser";

async fn call_from(server: &TestServer, version: Version, origin: &str, kind: &str) -> Answer {
    let head = post("AuthService/GetCurrentUser", kind, None).header("origin", origin);
    call(server.address, version, head, "{}").await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_page_of_our_own_or_of_a_named_origin_may_call_and_no_other() {
    let server = TestServer::start().await;
    for version in VERSIONS {
        for own in [format!("http://{}", server.address), format!("https://{}", server.address)] {
            let answer = call_from(&server, version, &own, "application/json").await;
            assert_eq!((answer.status.as_u16(), answer.header("access-control-allow-origin")), (401, None));
        }
        let answer = call_from(&server, version, ALLOWED_ORIGIN, "application/json").await;
        assert_eq!(answer.status, 401);
        assert_eq!(answer.header("access-control-allow-origin"), Some(ALLOWED_ORIGIN));
        assert_eq!(answer.header("access-control-expose-headers"), Some("x-request-id"));
        assert_eq!(answer.header("vary"), Some("origin"));
        for other in [
            "https://other.example.com",
            "http://app.example.com",
            "https://app.example.com:8443",
            "https://app.example.com.evil.example",
            "null",
            "",
            "http://127.0.0.1",
        ] {
            // By gRPC as well.
            for kind in ["application/json", "application/grpc"] {
                let answer = call_from(&server, version, other, kind).await;
                assert_eq!(answer.status, 403, "{other:?}");
                assert_eq!(answer.header("access-control-allow-origin"), None);
                assert!(answer.body.ends_with(b"--allow-origin names those that may\n"));
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_preflight_of_a_named_origin_is_answered_and_no_other() {
    let server = TestServer::start().await;
    let preflight = async |version, origin: &str| {
        let head = request(Method::OPTIONS, PATH)
            .header("origin", origin)
            .header("access-control-request-method", "POST")
            .header("access-control-request-headers", "authorization,content-type");
        call(server.address, version, head, "").await
    };
    for version in VERSIONS {
        let answer = preflight(version, ALLOWED_ORIGIN).await;
        assert_eq!(answer.status, 204);
        assert_eq!(answer.header("access-control-allow-origin"), Some(ALLOWED_ORIGIN));
        assert_eq!(answer.header("access-control-allow-methods"), Some("GET, POST"));
        let headers = answer.header("access-control-allow-headers").unwrap();
        for needed in ["authorization", "content-type", "connect-protocol-version", "connect-timeout-ms"] {
            assert!(headers.split(", ").any(|header| header == needed), "{headers}");
        }
        assert_eq!(preflight(version, "https://other.example.com").await.status, 403);
        let without_origin = call(server.address, version, request(Method::OPTIONS, PATH), "").await;
        assert_eq!(without_origin.status, 405);
    }
}

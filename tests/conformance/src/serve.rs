//! A server for the runner: it is told on stdin how to listen, and answers where on stdout.

use std::io::{Read as _, Write as _};

use clap::Parser;
use milepost::{
    config::{ServerSettings, TlsSettings},
    server::{Tls, serve_others},
};
use prost::Message as _;
use prost_reflect::DescriptorPool;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;

use crate::{
    pb::{ServerCompatRequest, ServerCompatResponse, conformance_service_server::ConformanceServiceServer},
    service::Conformance,
    trailers::WithTrailers,
};

const DESCRIPTORS: &[u8] = tonic::include_file_descriptor_set!("conformance");
/// Cases send messages of any size that the server accepts.
const MESSAGE_BYTES: usize = 1024 * 1024;

/// The defaults of a server.
#[derive(Parser)]
struct Defaults {
    #[command(flatten)]
    server: ServerSettings,
}

/// Serves until the runner ends this process.
pub async fn run() {
    let (mut length, mut stdin) = ([0; 4], std::io::stdin());
    stdin.read_exact(&mut length).unwrap();
    let mut request = vec![0; u32::from_be_bytes(length).try_into().unwrap()];
    stdin.read_exact(&mut request).unwrap();
    let request = ServerCompatRequest::decode(request.as_slice()).unwrap();

    let folder = std::env::temp_dir().join(format!("milepost-conformance-{}", std::process::id()));
    let mut pem_cert = Vec::new();
    let tls = if request.use_tls {
        std::fs::create_dir_all(&folder).unwrap();
        let write = |name: &str, content: &[u8]| {
            let path = folder.join(name);
            std::fs::write(&path, content).unwrap();
            Some(path)
        };
        let credentials = request.server_creds.unwrap();
        pem_cert.clone_from(&credentials.cert);
        let authority = &request.client_tls_cert;
        let settings = TlsSettings {
            tls_cert: write("certificate.pem", &credentials.cert),
            tls_key: write("key.pem", &credentials.key),
            tls_client_ca: (!authority.is_empty()).then(|| write("clients.pem", authority)).flatten(),
        };
        let tls = Tls::start(&settings).await.unwrap();
        std::fs::remove_dir_all(&folder).unwrap();
        tls
    } else {
        None
    };

    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port().into();
    let response = ServerCompatResponse { host: "127.0.0.1".to_owned(), port, pem_cert }.encode_to_vec();
    let mut stdout = std::io::stdout();
    stdout.write_all(&u32::try_from(response.len()).unwrap().to_be_bytes()).unwrap();
    stdout.write_all(&response).unwrap();
    stdout.flush().unwrap();

    let service = ConformanceServiceServer::new(Conformance).max_decoding_message_size(MESSAGE_BYTES);
    let services = WithTrailers(Routes::new(service).prepare());
    let settings = Defaults::parse_from(["conformance"]).server;
    let descriptors = DescriptorPool::decode(DESCRIPTORS).unwrap();
    serve_others(listener, tls, services, &descriptors, &settings, CancellationToken::new()).await;
}

//! A wire to the database that can be cut.

use std::time::Duration;

use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, UnixStream},
    sync::watch,
};

use super::TestDatabase;

/// What goes to the database by `database.url` passes here.
#[derive(Debug)]
pub struct Wire {
    pub database: TestDatabase,
    cut: watch::Sender<bool>,
}

impl Wire {
    pub async fn to(database: &TestDatabase) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (authority, name) = database.url.rsplit_once('/').unwrap();
        let (user, folder) = authority.rsplit_once('@').unwrap();
        let socket = format!("{}/.s.PGSQL.5432", folder.replace("%2F", "/"));
        let url = format!("{user}@{}/{name}", listener.local_addr().unwrap());
        let cut = watch::Sender::new(false);
        let state = cut.subscribe();
        tokio::spawn(async move {
            loop {
                let (mut client, _) = listener.accept().await.unwrap();
                let (socket, mut state) = (socket.clone(), state.clone());
                tokio::spawn(async move {
                    let pass = async {
                        let mut server = UnixStream::connect(&socket).await.unwrap();
                        // Either side may leave as it likes.
                        let _ = copy_bidirectional(&mut client, &mut server).await;
                    };
                    tokio::select! {
                        biased;
                        _ = state.wait_for(|cut| *cut) => {}
                        () = pass => {}
                    }
                });
            }
        });
        Self { database: database.through(url), cut }
    }

    /// Ends every connection, and each that is made from now on.
    pub fn cut(&self) {
        self.cut.send_replace(true);
    }

    pub fn mend(&self) {
        self.cut.send_replace(false);
    }
}

/// A moment long enough for what must not happen to happen.
pub const A_MOMENT: Duration = Duration::from_secs(1);

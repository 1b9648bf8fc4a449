//! A TCP proxy that misbehaves on demand: owns what a network can do to connections between a replica and a server.
//! Knows nothing of what is said over them.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::watch,
    task::{JoinHandle, JoinSet},
};

/// The most that is passed on at once, in bytes.
const CHUNK_BYTES: usize = 16 * 1024;

/// What happens to bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// They are passed on.
    Pass,
    /// Connections are accepted and kept, and nothing passes, in either direction, until the mode is another: as in a
    /// partition. What was held back then goes on its way, however late.
    Blackhole,
    /// Connections are broken, new ones at once.
    Refuse,
}

#[derive(Debug)]
struct Shared {
    upstream: SocketAddr,
    mode: watch::Sender<Mode>,
    /// Connections that began before this count are cut at their next answer.
    cuts: AtomicU64,
    opened: AtomicU64,
    was_cut: AtomicU64,
}

/// A proxy before one server. It stops, and its connections break, when this is dropped.
#[derive(Debug)]
pub struct Proxy {
    address: SocketAddr,
    shared: Arc<Shared>,
    server: JoinHandle<()>,
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.server.abort();
    }
}

impl Proxy {
    /// Starts on a free port of loopback.
    pub async fn start(upstream: SocketAddr) -> anyhow::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared {
            upstream,
            mode: watch::Sender::new(Mode::Pass),
            cuts: AtomicU64::new(0),
            opened: AtomicU64::new(0),
            was_cut: AtomicU64::new(0),
        });
        let server = tokio::spawn(accept(listener, Arc::clone(&shared)));
        Ok(Self { address, shared, server })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Changes what happens to bytes, on all connections.
    pub fn set(&self, mode: Mode) {
        self.shared.mode.send_replace(mode);
    }

    /// What happens to bytes now.
    pub fn mode(&self) -> Mode {
        *self.shared.mode.borrow()
    }

    /// Cuts every connection that is open now in the middle of the next answer that it carries.
    pub fn cut_mid_reply(&self) {
        self.shared.cuts.store(self.shared.opened.load(Ordering::SeqCst), Ordering::SeqCst);
    }

    /// How many connections were cut so.
    pub fn cut_count(&self) -> u64 {
        self.shared.was_cut.load(Ordering::SeqCst)
    }
}

async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    // The set breaks every connection when the proxy is dropped.
    let mut connections = JoinSet::new();
    loop {
        let Ok((stream, _)) = listener.accept().await else { continue };
        while connections.try_join_next().is_some() {}
        let number = shared.opened.fetch_add(1, Ordering::SeqCst);
        connections.spawn(connection(stream, Arc::clone(&shared), number));
    }
}

/// Carries one connection until either side ends it, or the mode breaks it.
async fn connection(client: TcpStream, shared: Arc<Shared>, number: u64) {
    let mut mode = shared.mode.subscribe();
    let carried = async {
        passing(&mut shared.mode.subscribe()).await;
        let Ok(server) = TcpStream::connect(shared.upstream).await else { return };
        let _ = client.set_nodelay(true);
        let _ = server.set_nodelay(true);
        let (client_in, client_out) = client.into_split();
        let (server_in, server_out) = server.into_split();
        tokio::select! {
            () = asks(client_in, server_out, &shared) => {}
            () = answers(server_in, client_out, &shared, number) => {}
        }
    };
    tokio::select! {
        () = carried => {}
        _ = mode.wait_for(|mode| *mode == Mode::Refuse) => {}
    }
}

async fn passing(mode: &mut watch::Receiver<Mode>) {
    // The sender lives as long as the connection.
    let _ = mode.wait_for(|mode| *mode == Mode::Pass).await;
}

async fn asks(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, shared: &Shared) {
    let mut mode = shared.mode.subscribe();
    let mut buffer = vec![0; CHUNK_BYTES];
    while let Ok(length @ 1..) = from.read(&mut buffer).await {
        passing(&mut mode).await;
        if to.write_all(&buffer[..length]).await.is_err() {
            return;
        }
    }
    // The end of what is asked is held back by a partition like anything else.
    passing(&mut mode).await;
}

async fn answers(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, shared: &Shared, number: u64) {
    let mut mode = shared.mode.subscribe();
    let mut buffer = vec![0; CHUNK_BYTES];
    while let Ok(length @ 1..) = from.read(&mut buffer).await {
        passing(&mut mode).await;
        if number < shared.cuts.load(Ordering::SeqCst) {
            shared.was_cut.fetch_add(1, Ordering::SeqCst);
            let _ = to.write_all(&buffer[..length / 2]).await;
            return;
        }
        if to.write_all(&buffer[..length]).await.is_err() {
            return;
        }
    }
    passing(&mut mode).await;
}

//! A server of bytes on loopback, which can be a proxy: owns what it saw.

use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, copy_bidirectional},
    net::{TcpListener, TcpStream},
    task::JoinHandle,
};

/// What it does with a request.
#[derive(Debug, Clone)]
pub(crate) enum Act {
    /// Answers so and keeps the connection.
    Answer(&'static str),
    /// Is a proxy: a tunnel for CONNECT.
    Tunnel,
}

#[derive(Debug)]
pub(crate) struct Raw {
    pub(crate) address: SocketAddr,
    accepted: Arc<AtomicUsize>,
    heads: Arc<Mutex<Vec<String>>>,
    server: JoinHandle<()>,
}

impl Drop for Raw {
    fn drop(&mut self) {
        self.server.abort();
    }
}

impl Raw {
    pub(crate) async fn start(act: Act) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let (accepted, heads) = (Arc::new(AtomicUsize::new(0)), Arc::new(Mutex::new(Vec::new())));
        let (count, seen) = (Arc::clone(&accepted), Arc::clone(&heads));
        let server = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                count.fetch_add(1, Ordering::SeqCst);
                tokio::spawn(serve(stream, act.clone(), Arc::clone(&seen)));
            }
        });
        Self { address, accepted, heads, server }
    }

    /// How many connections it accepted.
    pub(crate) fn accepted(&self) -> usize {
        self.accepted.load(Ordering::SeqCst)
    }

    /// The head of each request, lower case.
    pub(crate) fn heads(&self) -> Vec<String> {
        self.heads.lock().expect("no panic").clone()
    }
}

async fn serve(mut stream: TcpStream, act: Act, heads: Arc<Mutex<Vec<String>>>) {
    let mut bytes = Vec::new();
    loop {
        let Some(end) = bytes.windows(4).position(|four| four == b"\r\n\r\n") else {
            match stream.read_buf(&mut bytes).await {
                Ok(1..) => continue,
                _ => return,
            }
        };
        let head = String::from_utf8_lossy(&bytes[..end]).to_lowercase();
        bytes.drain(..end + 4);
        heads.lock().expect("no panic").push(head.clone());
        if let (Act::Tunnel, Some(target)) =
            (&act, head.strip_prefix("connect ").and_then(|rest| rest.split(' ').next()))
        {
            let Ok(mut there) = TcpStream::connect(target).await else { return };
            stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await.expect("written");
            let _ = copy_bidirectional(&mut stream, &mut there).await;
            return;
        }
        let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")?.parse::<usize>().ok());
        while bytes.len() < length.unwrap_or(0) {
            if !matches!(stream.read_buf(&mut bytes).await, Ok(1..)) {
                return;
            }
        }
        bytes.drain(..length.unwrap_or(0));
        let Act::Answer(answer) = act else { return };
        if stream.write_all(answer.as_bytes()).await.is_err() {
            return;
        }
    }
}

// SPDX-License-Identifier: Apache-2.0
//! Connections to a port of the pod's loopback interface. The guest's network namespace is the pod's.

use std::future::Future;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, copy_bidirectional_with_sizes};
use tokio::net::TcpStream;
use tokio::time::timeout;

/// The time limit for each address. Both together are less than the host waits.
const CONNECT_TIME: Duration = Duration::from_secs(4);
const BUFFER_BYTES: usize = 64 << 10;

/// Connects to 127.0.0.1, or else to ::1. The error describes both attempts.
pub async fn connect(port: u32) -> Result<TcpStream, String> {
    let port = u16::try_from(port)
        .ok()
        .filter(|port| *port > 0)
        .ok_or_else(|| format!("{port} is not a port number"))?;
    let first = match dial(TcpStream::connect((Ipv4Addr::LOCALHOST, port))).await {
        Ok(stream) => return Ok(stream),
        Err(e) => e,
    };
    dial(TcpStream::connect((Ipv6Addr::LOCALHOST, port)))
        .await
        .map_err(|second| {
            format!(
                "failed to connect to localhost:{port} in the pod: IPv4: {first}, IPv6: {second}"
            )
        })
}

async fn dial(connecting: impl Future<Output = io::Result<TcpStream>>) -> io::Result<TcpStream> {
    let stream = timeout(CONNECT_TIME, connecting).await??;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Copies data until both directions have ended.
pub async fn serve(
    mut host: impl AsyncRead + AsyncWrite + Unpin,
    mut server: TcpStream,
) -> io::Result<()> {
    copy_bidirectional_with_sizes(&mut host, &mut server, BUFFER_BYTES, BUFFER_BYTES)
        .await
        .map(drop)
}

#[cfg(test)]
mod tests {
    use super::{connect, serve};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    #[tokio::test]
    async fn a_server_on_either_loopback_is_reached_and_halves_close_alone() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let listener = TcpListener::bind(address).await.unwrap();
            let port = listener.local_addr().unwrap().port();
            let server = tokio::spawn(async move {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut asked = String::new();
                stream.read_to_string(&mut asked).await.unwrap();
                stream
                    .write_all(asked.to_uppercase().as_bytes())
                    .await
                    .unwrap();
            });
            let stream = connect(port.into()).await.unwrap();
            let (mut host, ours) = tokio::io::duplex(64);
            let serving = tokio::spawn(serve(ours, stream));
            host.write_all(b"hello").await.unwrap();
            host.shutdown().await.unwrap();
            let mut answer = String::new();
            host.read_to_string(&mut answer).await.unwrap();
            assert_eq!(answer, "HELLO", "{address}");
            server.await.unwrap();
            serving.await.unwrap().unwrap();
        }
    }

    #[tokio::test]
    async fn a_port_that_nobody_serves_is_named() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        drop(listener);
        let error = connect(port.into()).await.unwrap_err();
        assert!(
            error.contains(&port.to_string()) && error.contains("refused"),
            "{error}"
        );
        for port in [0, 65_536] {
            assert!(connect(port).await.unwrap_err().contains("not a port"));
        }
    }
}

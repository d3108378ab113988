// SPDX-License-Identifier: Apache-2.0
//! The door for fuzz targets: what reads the bytes of streaming clients.

use std::io;
use std::net::TcpListener;
use std::sync::Arc;

use tokio::io::{AsyncRead, AsyncWrite};

use super::peer::Peer;
pub use super::session::{FromClient, Size, SizeParser};
pub use super::spdy::{Connection, Stream};
use super::strangers::Strangers;
pub use super::websocket::Protocol;
use super::websocket::{WebSocketOutput, accept, client};

/// A client of a WebSocket.
pub type WebSocketClient<T> = super::session::Client<WebSocketOutput<T>>;

/// A peer that never hangs up.
fn peer() -> io::Result<Arc<Peer>> {
    let (stranger, _turn) = Arc::<Strangers>::default().enter();
    Peer::new(&TcpListener::bind("127.0.0.1:0")?, stranger).map(Arc::new)
}

/// The server's side of a SPDY connection.
pub fn spdy<T>(connection: T) -> io::Result<Connection>
where
    T: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let (reader, writer) = tokio::io::split(connection);
    Ok(Connection::new(reader, writer, peer()?))
}

/// The server's side of a WebSocket, after the HTTP upgrade.
pub async fn websocket<T>(connection: T, protocol: Protocol) -> io::Result<WebSocketClient<T>>
where
    T: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    Ok(client(accept(connection).await, protocol, peer()?).await)
}

// SPDX-License-Identifier: Apache-2.0
//! Messages on a byte stream: a length of four bytes, big-endian, then the message.

use std::io;

use prost::Message;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Reads a message of at most `limit` bytes.
pub async fn read<M: Message + Default>(
    reader: &mut (impl AsyncRead + Unpin),
    limit: usize,
) -> io::Result<M> {
    let length = usize::try_from(reader.read_u32().await?).unwrap_or(usize::MAX);
    if length > limit {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut bytes = vec![0; length];
    reader.read_exact(&mut bytes).await?;
    M::decode(bytes.as_slice()).map_err(io::Error::other)
}

pub async fn write(
    writer: &mut (impl AsyncWrite + Unpin),
    message: &impl Message,
) -> io::Result<()> {
    let body = message.encode_to_vec();
    let length = u32::try_from(body.len()).map_err(io::Error::other)?;
    let bytes = [&length.to_be_bytes()[..], &body].concat();
    writer.write_all(&bytes).await?;
    writer.flush().await
}

#[cfg(test)]
mod tests {
    use super::{read, write};
    use bulkhead_proto::agent::StreamOpened;

    #[tokio::test]
    async fn messages_are_prefixed_with_their_length() {
        let message = StreamOpened {
            error: "no".into(),
            log_offset: 7,
        };
        let mut bytes = Vec::new();
        write(&mut bytes, &message).await.unwrap();
        assert_eq!(bytes[..4], [0, 0, 0, 6]);
        let again: StreamOpened = read(&mut bytes.as_slice(), 6).await.unwrap();
        assert_eq!(again, message);
        let too_long = read::<StreamOpened>(&mut bytes.as_slice(), 5).await;
        assert!(too_long.is_err());
    }
}

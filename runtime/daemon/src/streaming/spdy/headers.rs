// SPDX-License-Identifier: Apache-2.0
//! Header blocks (SPDY/3.1, 2.6.10). They are compressed by zlib with a fixed dictionary. All blocks of one direction
//! of a connection are one zlib stream, so after an error the connection must end.

use std::collections::BTreeMap;

use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress, Status};

/// The longest decompressed block. Those of Kubernetes have a few hundred bytes, but zlib can make a thousand bytes of
/// one.
const MAX_BLOCK_BYTES: usize = 16 << 10;
const MAX_HEADERS: usize = 64;

/// The words of the dictionary (2.6.10.1), each of which comes after its length; and then [`TAIL`].
#[rustfmt::skip]
const WORDS: [&str; 65] = [
    "options", "head", "post", "put", "delete", "trace", "accept", "accept-charset",
    "accept-encoding", "accept-language", "accept-ranges", "age", "allow", "authorization",
    "cache-control", "connection", "content-base", "content-encoding", "content-language",
    "content-length", "content-location", "content-md5", "content-range", "content-type", "date",
    "etag", "expect", "expires", "from", "host", "if-match", "if-modified-since", "if-none-match",
    "if-range", "if-unmodified-since", "last-modified", "location", "max-forwards", "pragma",
    "proxy-authenticate", "proxy-authorization", "range", "referer", "retry-after", "server", "te",
    "trailer", "transfer-encoding", "upgrade", "user-agent", "vary", "via", "warning",
    "www-authenticate", "method", "get", "status", "200 OK", "version", "HTTP/1.1", "url", "public",
    "set-cookie", "keep-alive", "origin",
];
#[rustfmt::skip]
const TAIL: &str = concat!(
    "1001012012022052063003023033043053063074024054064074084094104114124134144154164175025045",
    "05203 Non-Authoritative Information204 No Content301 Moved Permanently400 Bad Request401",
    " Unauthorized403 Forbidden404 Not Found500 Internal Server Error501 Not Implemented503 S",
    "ervice UnavailableJan Feb Mar Apr May Jun Jul Aug Sept Oct Nov Dec 00:00:00 Mon, Tue, We",
    "d, Thu, Fri, Sat, Sun, GMTchunked,text/html,image/png,image/jpg,image/gif,application/xm",
    "l,application/xhtml+xml,text/plain,text/javascript,publicprivatemax-age=gzip,deflate,sdc",
    "hcharset=utf-8charset=iso-8859-1,utf-,*,enq=0.",
);

/// Headers by their names, which are in lower case.
pub type Headers = BTreeMap<String, String>;

/// A header block that breaks the protocol.
#[derive(Debug, thiserror::Error)]
pub enum HeaderError {
    #[error("a header block that zlib cannot decompress")]
    Compression(#[from] flate2::DecompressError),
    #[error("a header block of more than {MAX_BLOCK_BYTES} bytes")]
    TooLong,
    #[error("a header block with more than {MAX_HEADERS} headers")]
    TooMany,
    #[error("a header block that is cut off")]
    CutOff,
}

pub(super) fn dictionary() -> Vec<u8> {
    let mut dictionary = Vec::new();
    for word in WORDS {
        let length = u32::try_from(word.len()).unwrap_or(0);
        dictionary.extend_from_slice(&length.to_be_bytes());
        dictionary.extend_from_slice(word.as_bytes());
    }
    dictionary.extend_from_slice(TAIL.as_bytes());
    dictionary
}

/// Decodes the header blocks that one client sends.
#[derive(Debug)]
pub struct Decoder(Decompress);

impl Default for Decoder {
    fn default() -> Self {
        Self(Decompress::new(true))
    }
}

impl Decoder {
    pub fn decode(&mut self, block: &[u8]) -> Result<Headers, HeaderError> {
        parse(&self.inflate(block)?)
    }

    fn inflate(&mut self, block: &[u8]) -> Result<Vec<u8>, HeaderError> {
        let start = self.0.total_in();
        // One byte more than allowed, to notice a block that is too long.
        let mut plain = Vec::with_capacity(MAX_BLOCK_BYTES + 1);
        loop {
            let taken = usize::try_from(self.0.total_in() - start).unwrap_or(usize::MAX);
            let rest = block.get(taken..).unwrap_or_default();
            let before = plain.len();
            match self
                .0
                .decompress_vec(rest, &mut plain, FlushDecompress::Sync)
            {
                Err(e) if e.needs_dictionary().is_some() => {
                    self.0.set_dictionary(&dictionary())?;
                    continue;
                }
                Err(e) => return Err(e.into()),
                Ok(Status::StreamEnd) => return Ok(plain),
                Ok(Status::Ok | Status::BufError) => {}
            }
            if plain.len() > MAX_BLOCK_BYTES {
                return Err(HeaderError::TooLong);
            }
            let taken = usize::try_from(self.0.total_in() - start).unwrap_or(usize::MAX);
            if taken >= block.len() || plain.len() == before {
                return Ok(plain);
            }
        }
    }
}

/// Encodes the header blocks of the server's direction.
#[derive(Debug)]
pub struct Encoder(Compress);

impl Encoder {
    pub fn new() -> Result<Self, flate2::CompressError> {
        let mut compress = Compress::new(Compression::fast(), true);
        compress.set_dictionary(&dictionary())?;
        Ok(Self(compress))
    }

    /// Encodes a block without headers, which is all that replies to Kubernetes need.
    pub fn empty(&mut self) -> Result<Vec<u8>, flate2::CompressError> {
        let mut block = Vec::with_capacity(64);
        self.0
            .compress_vec(&0u32.to_be_bytes(), &mut block, FlushCompress::Sync)?;
        Ok(block)
    }
}

fn parse(mut plain: &[u8]) -> Result<Headers, HeaderError> {
    let count = number(&mut plain)?;
    if count > MAX_HEADERS {
        return Err(HeaderError::TooMany);
    }
    let mut headers = Headers::new();
    for _ in 0..count {
        let name = text(&mut plain)?.to_ascii_lowercase();
        let value = text(&mut plain)?;
        headers.insert(name, value);
    }
    Ok(headers)
}

fn number(plain: &mut &[u8]) -> Result<usize, HeaderError> {
    let (bytes, rest) = plain.split_first_chunk::<4>().ok_or(HeaderError::CutOff)?;
    *plain = rest;
    Ok(usize::try_from(u32::from_be_bytes(*bytes)).unwrap_or(usize::MAX))
}

fn text(plain: &mut &[u8]) -> Result<String, HeaderError> {
    let length = number(plain)?;
    let (bytes, rest) = plain.split_at_checked(length).ok_or(HeaderError::CutOff)?;
    *plain = rest;
    Ok(String::from_utf8_lossy(bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The client's compressor.
    fn compressor() -> Compress {
        let mut compress = Compress::new(Compression::best(), true);
        compress.set_dictionary(&dictionary()).unwrap();
        compress
    }

    fn pack(compress: &mut Compress, plain: &[u8]) -> Vec<u8> {
        let mut block = Vec::with_capacity(plain.len() + 1024);
        compress
            .compress_vec(plain, &mut block, FlushCompress::Sync)
            .unwrap();
        block
    }

    fn plain(headers: &[(&str, &str)]) -> Vec<u8> {
        let mut plain = u32::try_from(headers.len()).unwrap().to_be_bytes().to_vec();
        for text in headers.iter().flat_map(|(name, value)| [name, value]) {
            plain.extend(u32::try_from(text.len()).unwrap().to_be_bytes());
            plain.extend(text.as_bytes());
        }
        plain
    }

    #[test]
    fn the_dictionary_is_that_of_the_specification() {
        // RFC 1950's Adler-32, as zlib streams with this dictionary name it.
        let (mut a, mut b) = (1u32, 0u32);
        for byte in dictionary() {
            a = (a + u32::from(byte)) % 65_521;
            b = (b + a) % 65_521;
        }
        assert_eq!((dictionary().len(), b << 16 | a), (1423, 0xe3c6_a7c2));
    }

    #[test]
    fn blocks_of_one_connection_share_their_compression() {
        let (mut client, mut decoder) = (compressor(), Decoder::default());
        for kind in ["error", "stdin", "stdout"] {
            let block = pack(&mut client, &plain(&[("StreamType", kind), ("port", "80")]));
            let headers = decoder.decode(&block).unwrap();
            assert_eq!(headers["streamtype"], kind);
            assert_eq!(headers["port"], "80");
        }
    }

    #[test]
    fn our_own_blocks_are_empty_and_can_be_read() {
        let (mut encoder, mut decoder) = (Encoder::new().unwrap(), Decoder::default());
        for _ in 0..3 {
            let block = encoder.empty().unwrap();
            assert!(decoder.decode(&block).unwrap().is_empty());
        }
    }

    #[test]
    fn bombs_are_refused_by_size_and_by_count() {
        let bomb = vec![0; 10 << 20];
        let block = pack(&mut compressor(), &bomb);
        assert!(block.len() < 20_000);
        assert!(matches!(
            Decoder::default().decode(&block),
            Err(HeaderError::TooLong)
        ));
        let many = pack(&mut compressor(), &1000u32.to_be_bytes());
        assert!(matches!(
            Decoder::default().decode(&many),
            Err(HeaderError::TooMany)
        ));
        let cut = pack(&mut compressor(), &[0, 0, 0, 1, 0xff, 0xff, 0xff, 0xff]);
        assert!(matches!(
            Decoder::default().decode(&cut),
            Err(HeaderError::CutOff)
        ));
        assert!(Decoder::default().decode(b"not zlib").is_err());
    }

    proptest! {
        #[test]
        fn no_block_makes_the_decoder_fail_otherwise_than_by_an_error(
            raw in proptest::collection::vec(any::<u8>(), 0..256),
        ) {
            let _ = Decoder::default().decode(&raw);
            let _ = Decoder::default().decode(&pack(&mut compressor(), &raw));
        }
    }
}

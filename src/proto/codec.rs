use std::marker::PhantomData;

use prost::{Message, Name};
use tonic::{
    Code, Status,
    codec::{BufferSettings, DecodeBuf, Decoder},
};
use tonic_prost::{ProstCodec, ProstDecoder, ProstEncoder};

/// As tonic's own, but for what it says to a message that cannot be read: a request is its sender's fault, not the server's.
#[derive(Debug, Clone)]
pub struct Codec<T, U>(PhantomData<fn() -> (T, U)>);

impl<T, U> Default for Codec<T, U> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

impl<T, U> tonic::codec::Codec for Codec<T, U>
where
    T: Message + Send + 'static,
    U: Message + Default + Name + Send + 'static,
{
    type Encode = T;
    type Decode = U;
    type Encoder = ProstEncoder<T>;
    type Decoder = Read<U>;

    fn encoder(&mut self) -> Self::Encoder {
        ProstCodec::<T, U>::raw_encoder(BufferSettings::default())
    }

    fn decoder(&mut self) -> Self::Decoder {
        Read(ProstCodec::<T, U>::raw_decoder(BufferSettings::default()))
    }
}

/// Reads messages, and says which kind one should have been that is none.
#[derive(Debug)]
pub struct Read<U>(ProstDecoder<U>);

impl<U: Message + Default + Name> Decoder for Read<U> {
    type Item = U;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<U>, Status> {
        let code = if U::NAME.ends_with("Request") { Code::InvalidArgument } else { Code::Internal };
        self.0.decode(buffer).map_err(|error| {
            Status::new(code, format!("the message is no {}: {}", U::full_name(), error.message()))
        })
    }

    fn buffer_settings(&self) -> BufferSettings {
        self.0.buffer_settings()
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use http_body_util::Full;
    use tonic::codec::{Codec as _, Streaming};

    use super::*;
    use crate::proto::v1::{InstanceRef, RegisterRequest, RegisterResponse};

    async fn read<U: Message + Default + Name + Send + 'static>() -> Result<Option<U>, Status> {
        // Field 1 with a length of 255 bytes, of which none are there.
        let body = Full::new(Bytes::from_static(&[0, 0, 0, 0, 3, 0x0a, 0xff, 0x01]));
        Streaming::new_request(Codec::<InstanceRef, U>::default().decoder(), body, None, None).message().await
    }

    #[tokio::test]
    async fn who_sent_it_is_at_fault() {
        let request = read::<RegisterRequest>().await.unwrap_err();
        assert_eq!(request.code(), Code::InvalidArgument);
        assert!(request.message().starts_with("the message is no disco.v1.RegisterRequest: "), "{request}");
        assert_eq!(read::<RegisterResponse>().await.unwrap_err().code(), Code::Internal);
    }
}

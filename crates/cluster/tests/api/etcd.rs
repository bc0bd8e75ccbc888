//! etcd behind the API server's back, over its JSON gateway.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;

use serde_json::{Value, json};

/// The one of the control plane.
pub(crate) struct Etcd;

impl Etcd {
    fn post(&self, path: &str, body: &Value) -> Value {
        let body = body.to_string();
        // HTTP/1.0: the answer comes in one piece and ends the connection.
        let head = format!("POST /v3/{path} HTTP/1.0\r\nHost: etcd\r\nContent-Length: {}\r\n\r\n", body.len());
        let mut stream = TcpStream::connect("127.0.0.1:2379").unwrap();
        stream.write_all(format!("{head}{body}").as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        assert!(head.contains(" 200 "), "{answer}");
        serde_json::from_str(body).unwrap()
    }

    /// Stores objects below `/registry/`, many at once.
    pub(crate) fn put(&self, objects: &[(String, Value)]) {
        // etcd takes 128 operations in a transaction.
        for chunk in objects.chunks(100) {
            let put = |(key, value): &(String, Value)| json!({"requestPut": {"key": base64(format!("/registry/{key}").as_bytes()), "value": base64(value.to_string().as_bytes())}});
            let success: Vec<Value> = chunk.iter().map(put).collect();
            let answer = self.post("kv/txn", &json!({"success": success}));
            assert_eq!(answer["succeeded"], true, "{answer}");
        }
    }

    pub(crate) fn delete(&self, key: &str) {
        let answer = self.post("kv/deleterange", &json!({"key": base64(format!("/registry/{key}").as_bytes())}));
        assert_eq!(answer["deleted"], "1", "{answer}");
    }

    /// Forgets all versions but the latest.
    pub(crate) fn compact(&self) {
        let now = self.post("kv/range", &json!({"key": base64(b"/")}));
        self.post("kv/compaction", &json!({"revision": now["header"]["revision"], "physical": true}));
    }
}

fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::new();
    for chunk in bytes.chunks(3) {
        let number = chunk.iter().fold(0u32, |number, byte| number << 8 | u32::from(*byte)) << (8 * (3 - chunk.len()));
        for place in 0..4 {
            let digit = DIGITS[(number >> (18 - 6 * place) & 63) as usize];
            text.push(if place <= chunk.len() { char::from(digit) } else { '=' });
        }
    }
    text
}

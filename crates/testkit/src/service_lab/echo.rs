//! Servers that say which address and port they were reached at, and whose packets they saw.

use std::io;
use std::net::{IpAddr, SocketAddr};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpSocket, TcpStream, UdpSocket};

use super::sctp;

/// What fits into a server's queue, as far as the kernel's limit (`somaxconn`) allows: what all clients of a node open at
/// once. A connection that finds it full is dropped, and comes again after a second.
const BACKLOG: u32 = 4096;

/// Opens servers of TCP, UDP and SCTP on each of `ports` of each of `addresses`, in the calling task's namespace. They
/// live as long as its runtime.
pub(super) async fn serve(addresses: Vec<IpAddr>, ports: Vec<u16>) -> io::Result<()> {
    for address in addresses {
        for port in &ports {
            let here = SocketAddr::new(address, *port);
            tokio::spawn(serve_tcp(listen(here)?, here));
            let socket = UdpSocket::bind(here).await?;
            sctp::widen(&socket)?;
            tokio::spawn(serve_udp(socket, here));
        }
        let socket = sctp::Socket::bind(address)?;
        tokio::spawn(serve_sctp(socket, address, ports.clone()));
    }
    Ok(())
}

fn listen(here: SocketAddr) -> io::Result<TcpListener> {
    let socket = if here.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    socket.set_reuseaddr(true)?;
    socket.bind(here)?;
    socket.listen(BACKLOG)
}

async fn serve_tcp(listener: TcpListener, here: SocketAddr) {
    loop {
        // One that has gone before it was taken is no reason to take no others.
        if let Ok((stream, peer)) = listener.accept().await {
            // A client that has gone ends the conversation.
            tokio::spawn(async move { converse(stream, here, peer).await.ok() });
        }
    }
}

/// Says who asks, and sends back what comes until the client goes.
async fn converse(mut stream: TcpStream, here: SocketAddr, peer: SocketAddr) -> io::Result<()> {
    stream.read_u8().await?;
    stream.write_all(format!("{}\n", text(here, peer.ip())).as_bytes()).await?;
    let (mut from, mut to) = stream.split();
    tokio::io::copy(&mut from, &mut to).await.map(drop)
}

async fn serve_udp(socket: UdpSocket, here: SocketAddr) {
    let mut buffer = [0; 64];
    loop {
        // Errors are news of clients that have gone.
        if let Ok((_, peer)) = socket.recv_from(&mut buffer).await {
            let _ = socket.send_to(text(here, peer.ip()).as_bytes(), peer).await;
        }
    }
}

async fn serve_sctp(socket: sctp::Socket, address: IpAddr, ports: Vec<u16>) {
    loop {
        if let Ok((packet, peer)) = socket.receive().await
            && packet.is_init()
            && ports.contains(&packet.destination_port)
        {
            let here = SocketAddr::new(address, packet.destination_port);
            let _ = socket.send_to(&packet.answer(&text(here, peer)), peer).await;
        }
    }
}

fn text(here: SocketAddr, peer: IpAddr) -> String {
    format!("{here} {peer}")
}

/// What a server has said: where it was reached, and by whom.
pub(super) fn read(text: &str) -> Option<(SocketAddr, IpAddr)> {
    let (here, peer) = text.trim_end().split_once(' ')?;
    Some((here.parse().ok()?, peer.parse().ok()?))
}

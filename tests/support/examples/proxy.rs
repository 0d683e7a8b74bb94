//! scratch
#![allow(clippy::unwrap_used)]
use milepost_testing::*;
use std::time::{Duration, Instant};
use tokio::{io::{AsyncReadExt, AsyncWriteExt}, net::{UnixListener, UnixStream}, time::timeout};
async fn echo(dir: std::path::PathBuf, tag: u8) {
    std::fs::create_dir(&dir).unwrap();
    let l = UnixListener::bind(dir.join(".s.PGSQL.5432")).unwrap();
    tokio::spawn(async move { loop { let (mut s, _) = l.accept().await.unwrap(); tokio::spawn(async move {
        let mut b=[0;100]; while let Ok(n @ 1..) = s.read(&mut b).await { let mut v=b[..n].to_vec(); v.push(tag); if s.write_all(&v).await.is_err() {break} } }); } });
}
async fn ask(s: &mut UnixStream) -> Option<Vec<u8>> { 
    if s.write_all(b"x").await.is_err() { return Some(vec![]) }
    let mut b=[0;100]; match timeout(Duration::from_millis(700), s.read(&mut b)).await { Ok(Ok(n)) => Some(b[..n].to_vec()), Ok(Err(_)) => Some(vec![]), Err(_) => None } }
#[tokio::main]
async fn main() {
    let dir = TemporaryDir::new();
    let (a, b, p) = (dir.path().join("a"), dir.path().join("b"), dir.path().join("p"));
    echo(a.clone(), b'a').await; echo(b.clone(), b'b').await;
    let proxy = Proxy::at(&p, &a);
    let conn = || async { UnixStream::connect(p.join(".s.PGSQL.5432")).await };
    let mut one = conn().await.unwrap();
    assert_eq!(ask(&mut one).await.unwrap(), b"xa");
    proxy.lead_to(&b);
    let mut two = conn().await.unwrap();
    assert_eq!(ask(&mut two).await.unwrap(), b"xb");
    assert_eq!(ask(&mut one).await.unwrap(), b"xa");
    proxy.set(Mode::Hold);
    assert_eq!(ask(&mut one).await, None);
    proxy.set(Mode::Pass);
    assert_eq!({ let mut b=[0;100]; let n = one.read(&mut b).await.unwrap(); b[..n].to_vec() }, b"xa");
    proxy.set(Mode::Jitter(Duration::from_millis(50)));
    for _ in 0..10 { assert_eq!(ask(&mut one).await.unwrap(), b"xa"); }
    proxy.set(Mode::Delay(Duration::from_millis(100)));
    let t = Instant::now(); ask(&mut one).await.unwrap(); assert!(t.elapsed() > Duration::from_millis(190), "{:?}", t.elapsed());
    proxy.set(Mode::Pass);
    proxy.cut();
    assert_eq!(ask(&mut one).await.unwrap(), b""); assert_eq!(ask(&mut two).await.unwrap(), b"");
    let mut three = conn().await.unwrap();
    assert_eq!(ask(&mut three).await.unwrap(), b"xb");
    proxy.set(Mode::Refuse);
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(ask(&mut three).await.unwrap(), b""); assert!(conn().await.is_err());
    proxy.set(Mode::Pass);
    tokio::time::sleep(Duration::from_millis(100)).await;
    let mut four = conn().await.unwrap();
    assert_eq!(ask(&mut four).await.unwrap(), b"xb");
    proxy.set(Mode::Discard);
    assert_eq!(ask(&mut four).await, None);
    proxy.set(Mode::Pass);
    assert_eq!(ask(&mut four).await, None);
    // watchdog
    let mut c = tokio::process::Command::new("sleep"); c.arg("1000");
    let mut child = dir.run(c, "sleep.log");
    let pid = child.id().unwrap();
    let other = tokio::process::Command::new("sleep").arg("1001").spawn().unwrap();
    let opid = other.id().unwrap();
    drop(dir);
    assert!(!processes::runs(pid)); assert!(processes::runs(opid));
    let _ = child.wait().await;
    processes::signal(opid, processes::Signal::KILL);
    println!("OK");
}

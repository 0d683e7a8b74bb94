package milepost

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"

	milepostv1 "milepost/clients/go/milepost/v1"
)

// The server and a credential of a provider, for all tests.
var (
	server   *milepostServer
	provider struct{ id, session, key, customer, customerSession string }
)

func TestMain(m *testing.M) {
	os.Exit(runTests(m))
}

func runTests(m *testing.M) int {
	binary := os.Getenv("MILEPOST_BIN")
	if binary == "" {
		fmt.Fprintln(os.Stderr, "the tests need the path of the milepost binary in MILEPOST_BIN")
		return 1
	}
	folder := must(os.MkdirTemp("", "milepost-go-"))
	defer os.RemoveAll(folder)
	// Postgres, which does not run as root, must get through.
	must(0, os.Chmod(folder, 0o711))
	server = &milepostServer{binary: binary, data: filepath.Join(folder, "data")}
	server.start()
	defer server.stop(syscall.SIGTERM)
	createUsers()
	return m.Run()
}

func createUsers() {
	conn := dial(server.address.Load().(string), "")
	defer conn.Close()
	signUp := func(role milepostv1.UserRole, email string) *milepostv1.SignUpResponse {
		return must(milepostv1.NewAuthServiceClient(conn).SignUp(context.Background(),
			&milepostv1.SignUpRequest{Role: role, Email: email, Password: "correct horse battery"}))
	}
	customer := signUp(milepostv1.UserRole_USER_ROLE_CUSTOMER, "customer@example.com")
	user := signUp(milepostv1.UserRole_USER_ROLE_PROVIDER, "provider@example.com")
	provider.id, provider.customer = user.User.Id, customer.User.Id
	provider.session, provider.customerSession = user.Session.Secret, customer.Session.Secret

	session := dial(server.address.Load().(string), provider.session)
	defer session.Close()
	provider.key = createKey(session).Secret
	must(milepostv1.NewConfigurationServiceClient(session).RegisterJobConfiguration(context.Background(),
		&milepostv1.RegisterJobConfigurationRequest{
			Tag: "test", Name: "Test", Version: "1.0.0",
			Steps: []*milepostv1.StepConfiguration{{Tag: "work", Name: "Work", Points: 1}},
		}))
}

func createKey(session *grpc.ClientConn) *milepostv1.CreateApiKeyResponse {
	return must(milepostv1.NewAuthServiceClient(session).CreateApiKey(context.Background(), &milepostv1.CreateApiKeyRequest{
		Scopes: []milepostv1.ApiKeyScope{
			milepostv1.ApiKeyScope_API_KEY_SCOPE_READ, milepostv1.ApiKeyScope_API_KEY_SCOPE_APPEND,
		},
	}))
}

// dial returns a connection for what a test prepares and checks.
func dial(server, credential string) *grpc.ClientConn {
	return must(Dial(server, credential, grpc.WithDefaultCallOptions(grpc.WaitForReady(true))))
}

func must[T any](value T, err error) T {
	if err != nil {
		panic(err)
	}
	return value
}

// milepostServer is the binary, which can be stopped and started with the same data.
type milepostServer struct {
	binary, data string
	command      *exec.Cmd
	address      atomic.Value
}

func (s *milepostServer) start() {
	s.command = exec.Command(s.binary, "serve", "--listen", "127.0.0.1:0", "--data-dir", s.data, "--bcrypt-cost", "4", "--log-level", "off")
	s.command.Stderr = os.Stderr
	output := must(s.command.StdoutPipe())
	must(0, s.command.Start())
	line := must(bufio.NewReader(output).ReadString('\n'))
	rest, found := strings.CutPrefix(line, "milepost listens on ")
	if !found {
		panic("the server printed " + line)
	}
	address, _, _ := strings.Cut(rest, ",")
	s.address.Store(address)
}

func (s *milepostServer) stop(signal syscall.Signal) {
	must(0, s.command.Process.Signal(signal))
	s.command.Wait()
}

// proxy forwards connections to the server, and breaks them.
type proxy struct {
	address  string
	listener net.Listener

	mu          sync.Mutex
	running     *sync.Cond
	stalled     bool
	connections map[net.Conn]bool
}

func newProxy(listener net.Listener) *proxy {
	p := &proxy{address: listener.Addr().String(), listener: listener, connections: map[net.Conn]bool{}}
	p.running = sync.NewCond(&p.mu)
	go func() {
		for {
			client, err := listener.Accept()
			if err != nil {
				return
			}
			go p.forward(client)
		}
	}()
	return p
}

func (p *proxy) forward(client net.Conn) {
	defer client.Close()
	upstream, err := net.Dial("tcp", server.address.Load().(string))
	if err != nil {
		return
	}
	defer upstream.Close()
	p.mu.Lock()
	p.connections[client] = true
	p.mu.Unlock()
	go p.copy(upstream, client)
	p.copy(client, upstream)
	p.mu.Lock()
	delete(p.connections, client)
	p.mu.Unlock()
}

func (p *proxy) copy(to, from net.Conn) {
	defer to.Close()
	defer from.Close()
	buffer := make([]byte, 32<<10)
	for {
		n, err := from.Read(buffer)
		p.mu.Lock()
		for p.stalled {
			p.running.Wait()
		}
		p.mu.Unlock()
		if _, err := to.Write(buffer[:n]); err != nil {
			return
		}
		if err != nil {
			return
		}
	}
}

// stall stops all bytes until the proxy goes on.
func (p *proxy) stall(stalled bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.stalled = stalled
	p.running.Broadcast()
}

func (p *proxy) cut() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for connection := range p.connections {
		connection.Close()
	}
}

// bench is what one test needs: a job, a proxy, a connection through it for what is tested, and
// one for all else.
type bench struct {
	*testing.T
	proxy *proxy
	conn  *grpc.ClientConn
	other *grpc.ClientConn
	job   Job
}

// newBench ends the test as failed if it leaves goroutines.
func newBench(t *testing.T, options ...grpc.DialOption) *bench {
	before := runtime.NumGoroutine()
	p := newProxy(must(net.Listen("tcp", "127.0.0.1:0")))
	conn := must(Dial(p.address, provider.key, options...))
	b := &bench{T: t, proxy: p, conn: conn, other: dial(p.address, provider.key)}
	t.Cleanup(func() {
		p.stall(false)
		conn.Close()
		b.other.Close()
		p.listener.Close()
		p.cut()
		eventually(t, "the end of all goroutines", func() bool { return runtime.NumGoroutine() <= before })
	})
	b.job = b.newJob()
	return b
}

func (b *bench) newJob() Job {
	id := fmt.Sprintf("%s-%d", b.Name(), time.Now().UnixNano())
	answer := must(milepostv1.NewJobServiceClient(b.other).CreateJob(b.Context(), &milepostv1.CreateJobRequest{
		ProviderJobId: id, ConfigurationTag: "test",
		Customer: &milepostv1.CreateJobRequest_CustomerId{CustomerId: provider.customer},
	}))
	return Job{ID: answer.Job.Id}
}

// append stores events without a publisher.
func (b *bench) append(events ...*milepostv1.NewEvent) {
	must(milepostv1.NewEventServiceClient(b.other).AppendEvents(b.Context(), newRequest(b.job, events)))
}

// requestCancellation has the customer ask to stop a job, and returns when that was.
func (b *bench) requestCancellation(job Job) time.Time {
	conn := dial(b.proxy.address, provider.customerSession)
	defer conn.Close()
	answer := must(milepostv1.NewJobServiceClient(conn).RequestCancellation(b.Context(),
		&milepostv1.RequestCancellationRequest{JobId: job.ID, Reason: "enough"}))
	return answer.Job.CancellationRequestedAt.AsTime()
}

// stored returns the names of the job's events.
func (b *bench) stored(job Job) []string {
	var names []string
	request := &milepostv1.ListEventsRequest{Job: &milepostv1.ListEventsRequest_JobId{JobId: job.ID}, PageSize: 500}
	for {
		page := must(milepostv1.NewEventServiceClient(b.other).ListEvents(b.Context(), request))
		for _, event := range page.Events {
			names = append(names, event.Name)
		}
		if request.PageToken = page.NextPageToken; request.PageToken == "" {
			return names
		}
	}
}

func (b *bench) watchRequest() *milepostv1.WatchEventsRequest {
	return &milepostv1.WatchEventsRequest{Scope: &milepostv1.WatchEventsRequest_JobId{JobId: b.job.ID}}
}

func info(name string) *milepostv1.NewEvent {
	return &milepostv1.NewEvent{Kind: milepostv1.EventKind_EVENT_KIND_INFO, Name: name}
}

func progress(stepPercent int32) *milepostv1.NewEvent {
	return &milepostv1.NewEvent{
		Kind: milepostv1.EventKind_EVENT_KIND_PROGRESS, StepTag: "work", StepPercent: &stepPercent,
	}
}

func complete() *milepostv1.NewEvent {
	return &milepostv1.NewEvent{Kind: milepostv1.EventKind_EVENT_KIND_COMPLETE, Name: "complete"}
}

// refused is an event that the server refuses.
func refused() *milepostv1.NewEvent { return info(strings.Repeat("x", 300)) }

func eventually(t *testing.T, what string, holds func() bool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); !holds(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("waited in vain for ", what)
		}
	}
}

package milepost

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/stats"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	milepostv1 "milepost/clients/go/milepost/v1"
)

// read returns the names of all events until the watch ends.
func read(t *testing.T, watch *Watcher) []string {
	t.Helper()
	var names []string
	for event, err := range watch.Events() {
		if err != nil {
			t.Fatal(err)
		}
		names = append(names, event.Name)
	}
	return names
}

// errorOf returns the error with which a watch ends.
func errorOf(t *testing.T, watch *Watcher) *Error {
	t.Helper()
	for _, err := range watch.Events() {
		if failure, ok := errors.AsType[*Error](err); ok {
			return failure
		}
	}
	t.Fatal("the watch ended without an error")
	return nil
}

func assertEqual[T comparable](t *testing.T, got, want []T) {
	t.Helper()
	if !slices.Equal(got, want) {
		t.Fatalf("got %v, want %v", got, want)
	}
}

func TestEventsArriveOnceAndInOrderWhateverBreaks(t *testing.T) {
	b := newBench(t)
	conn := must(Dial(b.proxy.address, provider.key))
	defer conn.Close()
	publisher := NewPublisher(conn, PublisherOptions{})
	faults := []func(){
		b.proxy.cut,
		func() { server.stop(syscall.SIGKILL); server.start() },
		b.proxy.cut,
		func() { server.stop(syscall.SIGTERM); server.start() },
		func() { b.proxy.stall(true); time.AfterFunc(2*time.Second, func() { b.proxy.stall(false) }) },
	}
	want := append(numbers(1, 100), "complete")
	var seen atomic.Int64
	var faultsAreOver sync.WaitGroup
	faultsAreOver.Go(func() {
		for i, fault := range faults {
			for _, name := range want[20*i : 20*i+20] {
				appendTo(t, publisher, b.job, info(name))
			}
			eventually(t, "events", func() bool { return seen.Load() >= int64(20*i+10) })
			fault()
		}
		appendTo(t, publisher, b.job, complete())
	})

	interruptions := 0
	watch := Watch(t.Context(), b.conn, b.watchRequest(), WatchOptions{
		OnInterruption: func(error, time.Duration) { interruptions++ },
	})
	var names []string
	for event, err := range watch.Events() {
		if err != nil {
			t.Fatal(err)
		}
		if names = append(names, event.Name); event.Sequence != int64(len(names)) {
			t.Fatalf("sequence %d after %d events", event.Sequence, len(names)-1)
		}
		seen.Add(1)
	}
	faultsAreOver.Wait()
	if err := publisher.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	assertEqual(t, names, want)
	assertEqual(t, b.stored(b.job), want)
	if end := watch.End(); end.GetLastSequence() != 101 || end.GetStatus() != milepostv1.JobStatus_JOB_STATUS_COMPLETE {
		t.Errorf("the final state is %v", end)
	}
	if interruptions < 4 {
		t.Errorf("%d interruptions", interruptions)
	}
	if names := read(t, watch); len(names) > 0 {
		t.Errorf("events after the end: %v", names)
	}
}

func TestASilentConnectionInterruptsTheWatchAndNothingIsLost(t *testing.T) {
	b := newBench(t)
	b.append(info("1"))
	caughtUp := make(chan bool, 10)
	var interruptions []error
	watch := Watch(t.Context(), b.conn, b.watchRequest(), WatchOptions{
		OnCaughtUp: func(*milepostv1.CaughtUp) { caughtUp <- true },
		OnInterruption: func(err error, _ time.Duration) {
			interruptions = append(interruptions, err)
			b.proxy.stall(false)
		},
	})
	watch.silence = 3 * time.Second
	direct := dial(server.address.Load().(string), provider.key)
	defer direct.Close()
	go func() {
		<-caughtUp
		b.proxy.stall(true)
		events := []*milepostv1.NewEvent{info("2"), complete()}
		must(milepostv1.NewEventServiceClient(direct).AppendEvents(context.Background(), newRequest(b.job, events)))
	}()
	assertEqual(t, read(t, watch), []string{"1", "2", "complete"})
	if len(interruptions) == 0 || status.Code(interruptions[0]) != codes.DeadlineExceeded {
		t.Errorf("the interruptions are %v", interruptions)
	}
}

func TestTheTimeOfASlowReaderIsNoSilence(t *testing.T) {
	var call context.Context
	b := newBench(t, grpc.WithStreamInterceptor(func(
		ctx context.Context, desc *grpc.StreamDesc, conn *grpc.ClientConn, method string, open grpc.Streamer, options ...grpc.CallOption,
	) (grpc.ClientStream, error) {
		call = ctx
		return open(ctx, desc, conn, method, options...)
	}))
	b.append(info("1"), complete())
	watch := Watch(t.Context(), b.conn, b.watchRequest(), WatchOptions{})
	watch.silence = time.Second
	for _, err := range watch.Events() {
		if err != nil {
			t.Fatal(err)
		}
		if watch.silence == time.Second {
			time.Sleep(1500 * time.Millisecond)
			if call.Err() != nil {
				t.Error("the watch was interrupted while the loop did not read")
			}
			watch.silence = time.Minute
		}
	}
}

func TestHeartbeatsAreReported(t *testing.T) {
	b := newBench(t)
	request := b.watchRequest()
	request.HeartbeatInterval = durationpb.New(time.Second)
	ctx, cancel := context.WithCancel(t.Context())
	failure := errorOf(t, Watch(ctx, b.conn, request, WatchOptions{
		OnHeartbeat:    cancel,
		OnInterruption: func(err error, _ time.Duration) { t.Error("interrupted: ", err) },
	}))
	if failure.Code != codes.Canceled || !errors.Is(failure, context.Canceled) {
		t.Errorf("the error is %v", failure)
	}
}

// endedCalls counts the calls of WatchEvents that have ended in the client.
type endedCalls struct {
	stats.Handler
	watches atomic.Int64
}

type isWatch struct{}

func (e *endedCalls) TagRPC(ctx context.Context, info *stats.RPCTagInfo) context.Context {
	return context.WithValue(ctx, isWatch{}, info.FullMethodName == milepostv1.EventService_WatchEvents_FullMethodName)
}

func (e *endedCalls) HandleRPC(ctx context.Context, event stats.RPCStats) {
	if _, ended := event.(*stats.End); ended && ctx.Value(isWatch{}).(bool) {
		e.watches.Add(1)
	}
}
func (e *endedCalls) TagConn(ctx context.Context, _ *stats.ConnTagInfo) context.Context { return ctx }
func (e *endedCalls) HandleConn(context.Context, stats.ConnStats)                       {}

func TestLeavingTheLoopEndsTheCallAndAnotherLoopContinues(t *testing.T) {
	ended := &endedCalls{}
	b := newBench(t, grpc.WithStatsHandler(ended))
	b.append(info("1"), info("2"), info("3"))
	watch := Watch(t.Context(), b.conn, b.watchRequest(), WatchOptions{})
	for event := range watch.Events() {
		if event.GetName() == "2" {
			break
		}
	}
	eventually(t, "the end of the call", func() bool { return ended.watches.Load() == 1 })
	if token := watch.ResumeToken(); token != "" {
		t.Errorf("the token %q is that of a message that was not processed", token)
	}
	b.append(complete())
	assertEqual(t, read(t, watch), []string{"3", "complete"})
}

func TestATokenContinuesAfterItsMessage(t *testing.T) {
	b := newBench(t)
	b.append(info("1"), info("2"))
	first := Watch(t.Context(), b.conn, b.watchRequest(), WatchOptions{
		OnCaughtUp: func(*milepostv1.CaughtUp) { go b.append(info("3")) },
	})
	for event, err := range first.Events() {
		if err != nil {
			t.Fatal(err)
		}
		if event.Name == "3" {
			break
		}
	}
	b.append(complete())
	request := b.watchRequest()
	request.Start = &milepostv1.WatchEventsRequest_ResumeToken{ResumeToken: first.ResumeToken()}
	assertEqual(t, read(t, Watch(t.Context(), b.conn, request, WatchOptions{})), []string{"3", "complete"})
}

func TestACaughtUpWatchTellsTheStateOfEachStep(t *testing.T) {
	b := newBench(t)
	b.append(progress(40))
	var steps []*milepostv1.StepState
	watch := Watch(t.Context(), b.conn, b.watchRequest(), WatchOptions{
		OnCaughtUp: func(message *milepostv1.CaughtUp) {
			steps = message.GetSteps()
			b.append(complete())
		},
	})
	var percents []int32
	for event, err := range watch.Events() {
		if err != nil {
			t.Fatal(err)
		}
		percents = append(percents, event.GetStepPercent(), event.GetProgress().GetPercent())
	}
	assertEqual(t, percents, []int32{40, 40, 0, 100})
	if len(steps) != 1 || steps[0].Status != milepostv1.StepStatus_STEP_STATUS_UNDER_WAY || steps[0].Percent != 40 {
		t.Errorf("the steps are %v", steps)
	}
}

func TestAWatchOfAllJobsSeesEachJobInOrder(t *testing.T) {
	b := newBench(t)
	jobs := map[string][]string{b.job.ID: nil, b.newJob().ID: nil, b.newJob().ID: nil}
	publisher := NewPublisher(b.conn, PublisherOptions{})
	watch := Watch(t.Context(), b.conn, &milepostv1.WatchEventsRequest{
		Scope: &milepostv1.WatchEventsRequest_AllJobs{AllJobs: &milepostv1.AllJobs{ConfigurationTag: "test"}},
		Kinds: []milepostv1.EventKind{milepostv1.EventKind_EVENT_KIND_INFO},
		Start: &milepostv1.WatchEventsRequest_FromNow{FromNow: &milepostv1.FromNow{}},
	}, WatchOptions{OnCaughtUp: func(*milepostv1.CaughtUp) {
		for i := range 10 {
			for id := range jobs {
				appendTo(t, publisher, Job{ID: id}, info(strconv.Itoa(i)))
			}
		}
	}})
	events := 0
	for event, err := range watch.Events() {
		if err != nil {
			t.Fatal(err)
		}
		jobs[event.JobId] = append(jobs[event.JobId], event.Name)
		if events++; events == 30 {
			break
		}
	}
	for id, names := range jobs {
		assertEqual(t, names, b.stored(Job{ID: id}))
	}
	if err := publisher.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
}

func TestErrorsAreTyped(t *testing.T) {
	b := newBench(t)
	wrong := must(Dial(b.proxy.address, "mpk_wrong"))
	defer wrong.Close()
	unknown := &milepostv1.WatchEventsRequest{Scope: &milepostv1.WatchEventsRequest_JobId{JobId: provider.id}}
	beyond := b.watchRequest()
	beyond.Start = &milepostv1.WatchEventsRequest_AfterSequence{AfterSequence: 5}
	for _, test := range []struct {
		conn    *grpc.ClientConn
		request *milepostv1.WatchEventsRequest
		code    codes.Code
		reason  string
	}{
		{wrong, b.watchRequest(), codes.Unauthenticated, "CREDENTIAL_INVALID"},
		{b.conn, unknown, codes.NotFound, "RESOURCE_NOT_FOUND"},
		{b.conn, beyond, codes.OutOfRange, "POSITION_BEYOND_LOG"},
		{b.conn, &milepostv1.WatchEventsRequest{}, codes.InvalidArgument, "FIELD_INVALID"},
		{b.conn, &milepostv1.WatchEventsRequest{Scope: &milepostv1.WatchEventsRequest_ProviderJobId{ProviderJobId: "\xff"}}, codes.InvalidArgument, ""},
	} {
		failure := errorOf(t, Watch(t.Context(), test.conn, test.request, WatchOptions{
			OnInterruption: func(err error, _ time.Duration) { t.Error("interrupted: ", err) },
		}))
		wrapped := fmt.Errorf("wrapped: %w", failure)
		if failure.Code != test.code || failure.Reason != test.reason || status.Code(wrapped) != test.code || errors.Unwrap(failure) == nil {
			t.Errorf("%v, want %v %s", failure, test.code, test.reason)
		}
	}

	failure := errorOf(t, Watch(t.Context(), b.conn, unknown, WatchOptions{}))
	if !slices.ContainsFunc(failure.Details, func(detail any) bool {
		resource, ok := detail.(*errdetails.ResourceInfo)
		return ok && resource.ResourceName == provider.id
	}) {
		t.Errorf("the details are %v", failure.Details)
	}
}

// brokenStream ends with an error instead of its third message.
type brokenStream struct {
	grpc.ClientStream
	err      error
	received int
}

func (s *brokenStream) RecvMsg(message any) error {
	if s.received == 2 {
		return s.err
	}
	s.received++
	return s.ClientStream.RecvMsg(message)
}

func TestAStreamThatHasSentMessagesIsResumedAfterEachErrorWithoutDetails(t *testing.T) {
	for _, broken := range []error{io.EOF, status.Error(codes.PermissionDenied, "broken")} {
		streams, interruptions := 0, 0
		var caughtUp []int64
		b := newBench(t, grpc.WithStreamInterceptor(func(
			ctx context.Context, desc *grpc.StreamDesc, conn *grpc.ClientConn, method string, open grpc.Streamer, options ...grpc.CallOption,
		) (grpc.ClientStream, error) {
			stream, err := open(ctx, desc, conn, method, options...)
			if streams++; streams == 1 {
				stream = &brokenStream{ClientStream: stream, err: broken}
			}
			return stream, err
		}))
		b.append(info("1"), info("2"), complete())
		watch := Watch(t.Context(), b.conn, b.watchRequest(), WatchOptions{
			OnCaughtUp:     func(message *milepostv1.CaughtUp) { caughtUp = append(caughtUp, message.GetJob().GetLastSequence()) },
			OnInterruption: func(error, time.Duration) { interruptions++ },
		})
		assertEqual(t, read(t, watch), []string{"1", "2", "complete"})
		assertEqual(t, caughtUp, []int64{3, 3})
		if interruptions != 1 {
			t.Errorf("%d interruptions", interruptions)
		}
	}
}

func TestAStreamThatStartsWithAPermanentErrorIsNotResumed(t *testing.T) {
	b := newBench(t, grpc.WithStreamInterceptor(func(
		context.Context, *grpc.StreamDesc, *grpc.ClientConn, string, grpc.Streamer, ...grpc.CallOption,
	) (grpc.ClientStream, error) {
		return nil, status.Error(codes.PermissionDenied, "refused")
	}))
	if failure := errorOf(t, Watch(t.Context(), b.conn, b.watchRequest(), WatchOptions{})); failure.Code != codes.PermissionDenied {
		t.Errorf("the error is %v", failure)
	}
}

func TestARevokedKeyEndsTheWatch(t *testing.T) {
	b := newBench(t)
	session := dial(server.address.Load().(string), provider.session)
	defer session.Close()
	key := createKey(session)
	conn := must(Dial(b.proxy.address, key.Secret))
	defer conn.Close()
	failure := errorOf(t, Watch(t.Context(), conn, b.watchRequest(), WatchOptions{
		OnCaughtUp: func(*milepostv1.CaughtUp) {
			must(milepostv1.NewAuthServiceClient(session).ExpireApiKey(t.Context(), &milepostv1.ExpireApiKeyRequest{ApiKeyId: key.ApiKey.Id}))
		},
		OnInterruption: func(err error, _ time.Duration) { t.Error("interrupted: ", err) },
	}))
	if failure.Code != codes.Unauthenticated || failure.Reason != "CREDENTIAL_INVALID" {
		t.Errorf("the error is %v", failure)
	}
}

func TestAnEndedContextEndsTheWatch(t *testing.T) {
	b := newBench(t)
	b.proxy.stall(true)
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if failure := errorOf(t, Watch(ctx, b.conn, b.watchRequest(), WatchOptions{})); !errors.Is(failure, context.DeadlineExceeded) {
		t.Errorf("the error is %v", failure)
	}
}

// Watch prints the events of a job until the job is closed. It takes the address of the server
// from MILEPOST_SERVER and a credential from MILEPOST_API_KEY.
package main

import (
	"context"
	"fmt"
	"log"
	"os"
	"os/signal"
	"time"

	milepost "milepost/clients/go"
	milepostv1 "milepost/clients/go/milepost/v1"
)

func main() {
	if len(os.Args) != 2 {
		log.Fatal("usage: watch JOB")
	}
	conn, err := milepost.Dial(os.Getenv("MILEPOST_SERVER"), os.Getenv("MILEPOST_API_KEY"))
	if err != nil {
		log.Fatal(err)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()

	request := &milepostv1.WatchEventsRequest{Scope: &milepostv1.WatchEventsRequest_JobId{JobId: os.Args[1]}}
	watch := milepost.Watch(ctx, conn, request, milepost.WatchOptions{
		OnInterruption: func(err error, pause time.Duration) {
			log.Printf("interrupted, the watch resumes in %v: %v", pause, err)
		},
	})
	for event, err := range watch.Events() {
		if err != nil {
			log.Fatal(err)
		}
		fmt.Printf("%d %% after event %d: %v %s %s\n", event.Progress.Percent, event.Sequence, event.Kind, event.StepTag, event.Name)
	}
	fmt.Println("The job is closed:", watch.End().Status)
}
